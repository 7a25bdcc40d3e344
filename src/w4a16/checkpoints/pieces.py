"""Items of a stream on their way: memory on their device, cut into pieces, and the slots that these come through."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import torch
from torch import Tensor

from .shards import DTYPES, Entry, Run

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
    """A part of a batch's memory; `parts` are runs of the files, the byte to read each from, and where that goes."""

    into: Tensor
    parts: list[tuple[Run, int, slice]] = field(default_factory=list)


class Batch:
    """Items that are being read. `done` gets the event after which they all are there, or the first error."""

    def __init__(self, items: Sequence[Item], copies: torch.Stream | None, pieces: list[Piece], nbytes: int) -> None:
        self.items, self.copies, self.pieces, self.nbytes = deque(items), copies, pieces, nbytes
        self.done: SimpleQueue[torch.Event | BaseException | None] = SimpleQueue()
        self._coming, self._lock = len(pieces), Lock()

    def copied(self) -> None:
        """One piece more has been copied, or is about to be."""
        with self._lock:
            self._coming -= 1
            last = not self._coming
        if last:
            self.done.put(None if self.copies is None else self.copies.record_event())


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
    """Items in one memory on their device, yet to be filled; a single tensor gets no byte more than it has.

    What lies side by side in a file does so there, to be read at once.
    """
    entries = [entry for _, parts in stored for entry in parts.values()]
    runs = _runs(entries)
    sizes = [sum(entry.nbytes for entry in run.entries) for run in runs]
    *starts, total = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
    memory = torch.empty(total if len(entries) > 1 else sizes[0], dtype=torch.uint8, device=device)
    typed = {entry.dtype: memory.view(DTYPES[entry.dtype]) for entry in entries}
    pieces = [Piece(into) for into in memory.split(PIECE_BYTES)]
    fetched: dict[Entry, Entry] = {}
    for run, start, size in zip(runs, starts, sizes, strict=True):
        for number in range(start // PIECE_BYTES, -(-(start + size) // PIECE_BYTES)):
            first = number * PIECE_BYTES
            begin, end = max(start, first), min(start + size, first + PIECE_BYTES)
            pieces[number].parts.append((run, begin - start, slice(begin - first, end - first)))
        for entry in run.entries:
            values, place = typed[entry.dtype], start + entry.start - run.entries[0].start
            whole = values[place // values.itemsize : (place + entry.nbytes) // values.itemsize].view(entry.shape)
            fetched[entry] = Fetched(entry.name, entry.file, entry.dtype, entry.shape, entry.start, whole, entry, signs)
    items = [(name, {suffix: fetched[entry] for suffix, entry in parts.items()}) for name, parts in stored]
    return Batch(items, copies, pieces, memory.nbytes)


def _runs(entries: Sequence[Entry]) -> list[Run]:
    """Tensors that one read can get, each where a GPU may read it."""
    runs: list[Run] = []
    ends: dict[tuple[Path, int], Run] = {}
    for entry in sorted(entries, key=attrgetter("start")):
        run = ends.pop((entry.file, entry.start), None)
        if run is None or (entry.start - run.entries[0].start) % ALIGNMENT:
            runs.append(run := Run([]))
        run.entries.append(entry)
        ends[entry.file, entry.start + entry.nbytes] = run
    return runs
