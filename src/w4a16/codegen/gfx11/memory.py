"""Global memory: a copy of the storages that a kernel may touch, at addresses of the emulator's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import Fault

Array = NDArray[Any]
# Buffers straddle 2^32, so that a lost carry of an address is seen.
BASE = 0x7_FFFF_F000
ALIGNMENT, GUARD = 256, 4096


@dataclass(frozen=True, kw_only=True)
class Region:
    """Bytes that the kernel may touch: [start, stop) as offsets in the memory."""

    name: str
    start: int
    stop: int


class Memory:
    """Contents by `reserve`, then what may be touched by `allow`; `freeze` ends the setup."""

    def __init__(self) -> None:
        self._contents: list[tuple[int, Array]] = []
        self._regions = [Region(name="nothing", start=0, stop=64)]  # where inactive lanes read
        self._size = GUARD

    def reserve(self, contents: Array) -> int:
        """Places uint8 contents; returns their address."""
        offset = self._size
        self._contents.append((offset, contents))
        self._size = -(-(offset + len(contents) + GUARD) // ALIGNMENT) * ALIGNMENT
        return BASE + offset

    def allow(self, name: str, address: int, size: int) -> None:
        self._regions.append(Region(name=name, start=address - BASE, stop=address - BASE + size))

    def freeze(self) -> None:
        self.data = np.zeros(self._size, np.uint8)
        self._words = self.data.view(np.uint32)
        for offset, contents in self._contents:
            self.data[offset : offset + len(contents)] = contents
        self._regions.sort(key=lambda region: region.start)
        self._starts = np.array([region.start for region in self._regions], np.uint64)
        # A region may begin inside another (two views of one storage): what is allowed reaches to the furthest end.
        self._stops = np.maximum.accumulate(np.array([region.stop for region in self._regions], np.uint64))

    def contents(self, address: int, size: int) -> Array:
        return self.data[address - BASE : address - BASE + size]

    def load(self, address: Array, active: Array, size: int) -> Array:
        """uint8 [..., size] from each active address."""
        offset = self._checked(address, active, size)
        if size % 4 == 0 and not (offset & 3).any():
            words: Array = self._words[(offset >> 2)[..., None] + np.arange(size // 4)]
            return words.view(np.uint8)
        return self.data[offset[..., None] + np.arange(size)]

    def store(self, address: Array, active: Array, data: Array) -> None:
        size = data.shape[-1]
        offset = self._checked(address, active, size)[active]
        self.data[offset[:, None] + np.arange(size)] = data[active]

    def word(self, address: int) -> Array:
        """uint32 [1], in place: for atomics."""
        offset = int(self._checked(np.array([address], np.uint64), np.array([True]), 4)[0])
        if offset % 4:
            raise Fault(f"an atomic at {address:#x}, which is no multiple of 4")
        return self._words[offset >> 2 : (offset >> 2) + 1]

    def _checked(self, address: Array, active: Array, size: int) -> Array:
        offset = np.where(active, address - np.uint64(BASE), np.uint64(0))
        within = self._starts.searchsorted(offset, side="right") - 1
        outside = offset + np.uint64(size) > self._stops[within]
        if outside.any() or offset.max() > np.uint64(self._size):
            self._fault(int(offset[outside][0] if outside.any() else offset.max()), size)
        return offset.astype(np.int64)

    def _fault(self, offset: int, size: int) -> None:
        signed = offset - (1 << 64) if offset >> 63 else offset
        near = min(self._regions[1:], key=lambda r: max(r.start - signed, signed + size - r.stop))
        length = near.stop - near.start
        raise Fault(
            f"{size} bytes at {(signed + BASE) & (1 << 64) - 1:#x} are outside every argument; "
            f"nearest {near.name} ({length} bytes), at its byte {signed - near.start}"
        )
