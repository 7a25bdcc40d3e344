"""An item of a stream on its way: its memory on the device, cut into pieces, and the slots that these come through."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from itertools import accumulate
from queue import SimpleQueue

import torch
from torch import Tensor

from .shards import DTYPES, Entry

PIECE_BYTES = 8 << 20  # read and copied at a time
ALIGNMENT = 512  # of tensors on a GPU, as torch's allocator aligns them


Signs = list[tuple[Entry, Tensor]]  # numbers that are NaN where the values of a stored tensor are not sound


@dataclass(eq=False)
class Fetched(Entry):
    """A tensor of a file that lies on its device already."""

    values: Tensor
    stored: Entry
    signs: Signs

    def read(self) -> Tensor:
        return self.values

    def doubted(self, sign: Tensor) -> bool:
        """Not yet: to look is to wait for all that the GPU has to do. The stream looks at every sign at its end."""
        self.signs.append((self.stored, sign))
        return False


@dataclass(eq=False)
class Piece:
    """A part of an item's memory; `parts` are stored tensors, the byte to read each from, and where that goes in it."""

    into: Tensor
    parts: list[tuple[Entry, int, slice]] = field(default_factory=list)


@dataclass(eq=False)
class Coming:
    """An item that is being read. `done` gets, for every piece, the event after which it is there, or the error."""

    name: str
    entries: dict[str, Entry]
    copies: torch.Stream | None
    pieces: list[Piece]
    nbytes: int
    done: SimpleQueue[torch.Event | BaseException | None] = field(default_factory=SimpleQueue)


class Slot:
    """Memory of one piece, pinned where GPUs read it."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self.memory = torch.empty(0)
        self.view = memoryview(b"")
        self.copied: torch.Event | None = None

    def wait(self) -> None:
        """Until its memory is there and the last copies from it are done."""
        if not len(self.view):
            self.memory = torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
            self.view = memoryview((ctypes.c_ubyte * PIECE_BYTES).from_address(self.memory.data_ptr())).cast("B")
        elif self.copied is not None:
            self.copied.synchronize()


def begun(
    name: str, stored: dict[str, Entry], device: torch.device, copies: torch.Stream | None, signs: Signs
) -> Coming:
    """An item with memory on its device, which has yet to be filled; a single tensor gets no byte more than it has."""
    sizes = [entry.nbytes for entry in stored.values()]
    starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes[:-1]), initial=0))
    total = starts[-1] + sizes[-1]
    memory = torch.empty(total, dtype=torch.uint8, device=device)
    entries: dict[str, Entry] = {}
    pieces = [Piece(into) for into in memory.split(PIECE_BYTES)]
    for (suffix, entry), start, size in zip(stored.items(), starts, sizes, strict=True):
        values = memory[start : start + size].view(DTYPES[entry.dtype]).view(entry.shape)
        fields = entry.name, entry.file, entry.dtype, entry.shape, entry.start
        entries[suffix] = Fetched(*fields, values, entry, signs)
        for number in range(start // PIECE_BYTES, -(-(start + size) // PIECE_BYTES)):
            first = number * PIECE_BYTES
            begin, end = max(start, first), min(start + size, first + PIECE_BYTES)
            pieces[number].parts.append((entry, begin - start, slice(begin - first, end - first)))
    return Coming(name, entries, copies, pieces, total)
