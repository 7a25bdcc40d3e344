"""Items of a stream on their way: memory on their device, cut into pieces, and the slots that these come through."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from queue import SimpleQueue

import torch
from torch import Tensor

from .shards import DTYPES, Entry

PIECE_BYTES = 8 << 20  # read and copied at a time
ALIGNMENT = 512  # of tensors on a GPU, as torch's allocator aligns them


Item = tuple[str, dict[str, Entry]]  # its name, and its tensors by suffix
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
    """A part of a batch's memory; `parts` are stored tensors, the byte to read each from, and where that goes in it."""

    into: Tensor
    parts: list[tuple[Entry, int, slice]] = field(default_factory=list)


@dataclass(eq=False)
class Batch:
    """Items that are being read. `done` gets, for every piece, the event after which it is there, or the error."""

    items: deque[Item]
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


def begun(stored: Sequence[Item], device: torch.device, copies: torch.Stream | None, signs: Signs) -> Batch:
    """Items in one memory on their device, yet to be filled; a single tensor gets no byte more than it has."""
    sizes = [entry.nbytes for _, parts in stored for entry in parts.values()]
    starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes[:-1]), initial=0))
    total = starts[-1] + sizes[-1]
    memory = torch.empty(total, dtype=torch.uint8, device=device)
    pieces = [Piece(into) for into in memory.split(PIECE_BYTES)]
    spans = zip(starts, sizes, strict=True)

    def placed(entry: Entry) -> Entry:
        start, size = next(spans)
        for number in range(start // PIECE_BYTES, -(-(start + size) // PIECE_BYTES)):
            first = number * PIECE_BYTES
            begin, end = max(start, first), min(start + size, first + PIECE_BYTES)
            pieces[number].parts.append((entry, begin - start, slice(begin - first, end - first)))
        values = memory[start : start + size].view(DTYPES[entry.dtype]).view(entry.shape)
        return Fetched(entry.name, entry.file, entry.dtype, entry.shape, entry.start, values, entry, signs)

    items = [(name, {suffix: placed(entry) for suffix, entry in parts.items()}) for name, parts in stored]
    return Batch(deque(items), copies, pieces, total)
