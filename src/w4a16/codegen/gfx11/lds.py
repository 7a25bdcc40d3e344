"""LDS of the workgroups that run together, with a record of who touched which byte since the last barrier."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .faults import Fault

if TYPE_CHECKING:
    from .state import Gang

Array = NDArray[Any]
NOBODY, SEVERAL = -1, -2


BANKS, BANK_BYTES = 32, 4  # of a CU: 128 bytes a clock


class Meter:
    """LDS cycles by instruction: `cycles[pc]` of all the waves that executed it, `waves[pc]` how many those were."""

    def __init__(self) -> None:
        self.cycles: Counter[int] = Counter()
        self.waves: Counter[int] = Counter()

    def count(self, gang: Gang, address: Array, size: int) -> None:
        """As many lanes as make up 128 bytes go at once; of those, each bank serves one word a cycle."""
        at_once = BANKS * BANK_BYTES // max(size, BANK_BYTES)
        start = np.broadcast_to(address, gang.active.shape).astype(np.int64)
        words = start[..., None] // BANK_BYTES + np.arange(max(1, size // BANK_BYTES))
        for wave, active in zip(words, gang.active, strict=True):
            for first in range(0, len(active), at_once):
                lanes = slice(first, first + at_once)
                distinct = np.unique(wave[lanes][active[lanes]])
                self.cycles[gang.pc] += int(np.bincount(distinct % BANKS, minlength=1).max())
        self.waves[gang.pc] += gang.count


class Lds:
    def __init__(self, groups: int, size: int, meter: Meter | None = None) -> None:
        self.size, self.meter = size, meter
        self._data = np.zeros(groups * size, np.uint8)
        self._written = np.zeros(groups * size, bool)
        self._writer = np.full(groups * size, NOBODY, np.int16)
        self._reader = np.full(groups * size, NOBODY, np.int16)

    def barrier(self) -> None:
        self._writer[:] = NOBODY
        self._reader[:] = NOBODY

    def load(self, gang: Gang, address: Array, size: int) -> Array:
        """uint8 [waves, 32, size]."""
        if self.meter:
            self.meter.count(gang, address, size)
        data = np.zeros((*gang.active.shape, size), np.uint8)
        at, wave = self._index(gang, address, size)
        if not self._written[at].all():
            raise Fault("LDS is read before it was written")
        writer = self._writer[at]
        if ((writer != NOBODY) & (writer != wave)).any():
            raise Fault("a wave reads LDS that another wave wrote, with no barrier between them")
        reader = self._reader[at]
        self._reader[at] = np.where((reader == NOBODY) | (reader == wave), wave, SEVERAL)
        # two waves of this very instruction: the later one hid the earlier
        at_again = at[self._reader[at] != wave]
        self._reader[at_again] = SEVERAL
        data[gang.active] = self._data[at]
        return data

    def store(self, gang: Gang, address: Array, data: Array) -> None:
        if self.meter:
            self.meter.count(gang, address, data.shape[-1])
        at, wave = self._index(gang, address, data.shape[-1])
        new, writer, reader = data[gang.active], self._writer[at], self._reader[at]
        same = (self._data[at] == new) & self._written[at]  # replicated layouts store equal bytes from several waves
        taken = ((writer != NOBODY) & (writer != wave)) | ((reader != NOBODY) & (reader != wave))
        if (taken & ~same).any():
            raise Fault("a wave overwrites LDS that another wave uses, with no barrier between them")
        self._data[at], self._written[at] = new, True
        self._writer[at] = np.where(same & (writer != NOBODY), writer, wave)
        if ((self._writer[at] != wave) & (self._data[at] != new)).any():
            raise Fault("two waves write different values to one byte of LDS, with no barrier between them")

    def _index(self, gang: Gang, address: Array, size: int) -> tuple[Array, Array]:
        """Bytes [active, size] in the data of all workgroups, and the wave [active, 1] that touches them."""
        start = np.broadcast_to(address, gang.active.shape)[gang.active].astype(np.int64)
        if len(start) and start.max() + size > self.size:
            raise Fault(f"LDS address {start.max()} + {size} is outside the {self.size} bytes of a workgroup")
        wave, group = (np.repeat(x, gang.active.sum(1)) for x in (gang.waves, gang.groups))
        return (start + group * self.size)[:, None] + np.arange(size), wave[:, None].astype(np.int16)
