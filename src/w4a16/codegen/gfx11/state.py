"""Gang: the registers of waves that stand at one instruction, and so execute it together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import Fault
from .lds import Lds
from .memory import Memory

LANES = 32
VGPRS, SGPRS = 256, 129
VCC, NULL, M0, EXEC, SCC = 106, 124, 125, 126, 128
_BIT = np.uint32(1) << np.arange(LANES, dtype=np.uint32)
Array = NDArray[Any]


class Gang:
    """v        uint32 [256, waves, 32]
    s        uint32 [129, waves, 1]; scc is the last
    active   bool [waves, 32], what EXEC says; `full` when all are
    scratch  uint8 [waves, 32, bytes], and which bytes were written
    readable  bool [waves, 32], during a DPP instruction: lanes whose source lane can be read
    waves    index of each wave in its workgroup; groups: the workgroup's index in `lds`
    """

    def __init__(self, waves: Array, groups: Array, memory: Memory, lds: Lds, scratch_bytes: int, seed: int) -> None:
        count = len(waves)
        garbage = np.random.default_rng(seed)  # registers hold anything at the start, as on hardware
        self.v: Array = garbage.integers(0, 1 << 32, (VGPRS, count, LANES), dtype=np.uint32)
        self.s: Array = garbage.integers(0, 1 << 32, (SGPRS, count, 1), dtype=np.uint32)
        self.s[NULL] = 0
        self.s[SCC] &= 1
        self.scratch: Array = np.zeros((count, LANES, scratch_bytes), np.uint8)
        self.written: Array = np.zeros((count, LANES, scratch_bytes), bool)
        self.waves, self.groups = waves, groups
        self.memory, self.lds = memory, lds
        self.pc = 0
        self.readable: Array = np.ones((count, LANES), bool)
        self.write_scalar(EXEC, np.full((count, 1), 0xFFFFFFFF, np.uint32))

    @property
    def count(self) -> int:
        return len(self.waves)

    def set_active(self, active: Array) -> None:
        self.active = active
        self.full = bool(active.all())

    def write(self, index: int, value: Array) -> None:
        """uint32 into a VGPR, in the active lanes."""
        if self.full:
            self.v[index] = value
        else:
            np.copyto(self.v[index], value, where=self.active)

    def write_half(self, index: int, value: Array, high: bool) -> None:
        """16 bits into one half of a VGPR; the other half stays."""
        old = self.v[index]
        word = value.astype(np.uint32)
        if high:
            self.write(index, (old & np.uint32(0xFFFF)) | word << np.uint32(16))
        else:
            self.write(index, (old & np.uint32(0xFFFF0000)) | word)

    def write_scalar(self, index: int, value: Array) -> None:
        """uint32 [waves, 1] into an SGPR."""
        if index == NULL:
            return
        self.s[index] = value
        if index == EXEC:
            self.set_active((self.s[EXEC] & _BIT).astype(bool))

    def write_mask(self, index: int, lanes: Array) -> None:
        """bool [waves, 32] into a lane mask; inactive lanes give 0."""
        self.write_scalar(index, mask_bits(lanes & self.active))

    def scratch_load(self, address: Array, size: int) -> Array:
        """uint8 [waves, 32, size]."""
        at, wave, lane = self._scratch_index(address, size)
        if not (self.written[wave, lane, at] | ~self.active[..., None]).all():
            raise Fault("scratch is read before it was written")
        return self.scratch[wave, lane, at]

    def scratch_store(self, address: Array, data: Array) -> None:
        at, wave, lane = (np.broadcast_to(x, data.shape) for x in self._scratch_index(address, data.shape[-1]))
        where = wave[self.active], lane[self.active], at[self.active]
        self.scratch[where] = data[self.active]
        self.written[where] = True

    def _scratch_index(self, address: Array, size: int) -> tuple[Array, Array, Array]:
        start = np.where(self.active, address, 0).astype(np.int64)
        if start.min() < 0 or start.max() + size > self.scratch.shape[-1]:
            raise Fault(f"scratch address {start.max()} is outside the {self.scratch.shape[-1]} bytes of a lane")
        return start[..., None] + np.arange(size), np.arange(self.count)[:, None, None], np.arange(LANES)[:, None]

    def split(self, taken: Array) -> tuple[Gang, Gang]:
        """The waves where `taken`, and the others."""
        return self._take(taken), self._take(~taken)

    def _take(self, which: Array) -> Gang:
        part = object.__new__(Gang)
        part.v, part.s = self.v[:, which], self.s[:, which]
        part.scratch, part.written = self.scratch[which], self.written[which]
        part.waves, part.groups = self.waves[which], self.groups[which]
        part.memory, part.lds, part.pc = self.memory, self.lds, self.pc
        part.readable = self.readable[which]
        part.set_active(self.active[which])
        return part

    def join(self, other: Gang) -> None:
        """Takes in the waves of another gang at the same instruction."""
        self.v, self.s = (np.concatenate(pair, 1) for pair in ((self.v, other.v), (self.s, other.s)))
        self.scratch = np.concatenate((self.scratch, other.scratch))
        self.written = np.concatenate((self.written, other.written))
        self.readable = np.concatenate((self.readable, other.readable))
        self.waves = np.concatenate((self.waves, other.waves))
        self.groups = np.concatenate((self.groups, other.groups))
        self.set_active(np.concatenate((self.active, other.active)))


def mask_bits(lanes: Array) -> Array:
    """bool [waves, 32] to uint32 [waves, 1]."""
    return np.bitwise_or.reduce(np.where(lanes, _BIT, np.uint32(0)), axis=1, keepdims=True)
