"""Modules and tensors of a checkpoint in the order of their use, read ahead of it by threads, straight onto a GPU.

Threads read files into a few pinned pieces of memory and have each copied to where it belongs on the GPU, which at the
same time brings what came before into its plain form, checks and packs it. A CPU gains nothing from threads and reads
one by one.
"""

from __future__ import annotations

import gc
import math
import threading
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from itertools import cycle
from queue import Empty, SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from ..errors import BadInput, explain_mismatch
from ..weight import QuantizedWeight
from .base import Plan, poisoned
from .pieces import Batch, Item, Piece, Signs, Slot, begun
from .reader import Checkpoint
from .shards import Entry, Files

READERS = 4  # each copies 3 to 6 GB/s out of the page cache; of 8, each waits half of its time for Python's lock
SLOTS = 3  # pieces of each in pinned memory, read or being copied; a GB of it would take 0.4 s to pin
# Of weights that lie on the GPU before their turn, at least one batch: what is read while CUDA loads the kernels that
# pack, 0.1 s. They take no memory that the packed ones will not take, which have as many bytes.
AHEAD_BYTES = 960 << 20
BATCH_BYTES = 128 << 20  # of items read, and packed, together: one costs as much Python as a layer of an 8B model


class Stream:
    """`items` are (name, device) of quantised modules and dense tensors; they must be asked for in this order.

    Use it as a context manager: leaving it, for whatever reason, stops the threads. Leaving it without another error
    raises BadCheckpoint when a scale of any weight would poison the output: on a GPU nobody waits for that before.
    Within it Python collects no garbage: of the thousands of records made none is, and a collection stops the threads.
    """

    def __init__(
        self, checkpoint: Checkpoint, items: Sequence[tuple[str, torch.device]], *, readers: int | None = None
    ) -> None:
        self.path = checkpoint.path
        self._checkpoint = checkpoint
        self._items = deque(items)
        self._dense = set(checkpoint.dense)
        self._collects = False
        sizes: Counter[torch.device] = Counter()
        for name, device in items:
            if device.type == "cuda":
                sizes[device] += sum(entry.nbytes for entry in checkpoint.entries(name).values())
        self._copies = {device: torch.Stream(device=device) for device in sizes}
        self._coming: deque[Batch] = deque()
        self._there: deque[Item] = deque()  # of the batch that the last item came from
        self._ahead = 0
        self._signs: Signs = []
        self._jobs: SimpleQueue[tuple[Batch, Piece] | None] = SimpleQueue()
        count = READERS * bool(sizes) if readers is None else readers
        self._threads = [threading.Thread(target=self._work, name=f"w4a16-read-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()
        for gpu, size in sizes.items():
            # one request to the driver, of which torch then gives parts: 200 of them took 0.03 s and more
            with suppress(torch.OutOfMemoryError):
                torch.empty(size, dtype=torch.uint8, device=gpu)

    def __enter__(self) -> Stream:
        self._collects |= gc.isenabled()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._collects:
            gc.enable()
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for device, copies in self._copies.items():  # before the memory that they write to is given out again
            torch.accelerator.current_stream(device).wait_stream(copies)
        self._coming.clear()
        self._there.clear()
        if error is None:
            self._settle()

    def _settle(self) -> None:
        for device in {sign.device for _, sign in self._signs}:
            there = [(entry, sign) for entry, sign in self._signs if sign.device == device]
            numbers = torch.stack([sign for _, sign in there]).tolist()
            for (entry, _), number in zip(there, numbers, strict=True):
                if math.isnan(number):
                    raise poisoned(entry, entry.read())

    def begin(self) -> None:
        """Has the first items read before they are asked for, where there is memory for them."""
        if self._threads:
            with suppress(torch.OutOfMemoryError):
                self._read_ahead()

    @property
    def more(self) -> bool:
        """Whether the next item has come with the last one: what is done to both at once waits for nothing."""
        return bool(self._there)

    def plan(self, module: str) -> Plan:
        return self._checkpoint.plan(module)

    def weight(self, module: str) -> QuantizedWeight:
        """The next item, a quantised module, on its device, its values checked; its scales when the stream is left."""
        return self._checkpoint.weight(module, self._next(module))

    def tensor(self, name: str) -> Tensor:
        """The next item, a dense tensor, on its device, in memory of its own."""
        values = self._next(name)[""].read()
        return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()

    def _next(self, name: str) -> dict[str, Entry]:
        there = self._there or (self._coming[0].items if self._coming else self._items)
        coming = there[0][0] if there else "the end"
        if name != coming:
            then = "Ask for the items in the order they were given."
            raise BadInput(explain_mismatch(f"{self.path}: next of the stream", got=name, wanted=coming, then=then))
        if not self._threads:
            self._items.popleft()
            return self._checkpoint.entries(name)
        if not self._there:
            self._read_ahead()
            batch = self._coming.popleft()
            self._ahead -= self._cost(batch)
            copied = batch.done.get()
            if isinstance(copied, BaseException):
                raise copied
            if copied is not None:
                torch.accelerator.current_stream(copied.device).wait_event(copied)
            self._there = batch.items
        return self._there.popleft()[1]

    def _read_ahead(self) -> None:
        """Asks the threads for batches until as many bytes wait as may, and for the next one in any case."""
        while self._items and (not self._coming or self._ahead < AHEAD_BYTES):
            stored, device = self._next_batch()
            try:
                batch = begun(stored, device, self._copies.get(device), self._signs)
            except torch.OutOfMemoryError:
                if not self._coming:
                    raise
                return  # there may be room when those have been packed
            for _ in stored:
                self._items.popleft()
            if batch.copies is not None:
                # the memory may be that of a tensor which the work queued so far still reads
                batch.copies.wait_stream(torch.accelerator.current_stream(device))
            self._coming.append(batch)
            self._ahead += self._cost(batch)
            for piece in batch.pieces:
                self._jobs.put((batch, piece))

    def _next_batch(self) -> tuple[list[Item], torch.device]:
        """The next items of one kind and device that BATCH_BYTES hold, at least one."""
        (first, where), nbytes = self._items[0], 0
        stored: list[Item] = []
        for name, device in self._items:
            parts = self._checkpoint.entries(name)
            nbytes += sum(entry.nbytes for entry in parts.values())
            alike = device == where and (name in self._dense) == (first in self._dense)
            if stored and not (alike and nbytes <= BATCH_BYTES):
                break
            stored.append((name, parts))
        return stored, where

    def _cost(self, batch: Batch) -> int:
        """Its bytes of reading ahead: none for a dense tensor, which stays where it is read to."""
        return 0 if batch.items[0][0] in self._dense else batch.nbytes

    def _work(self) -> None:
        """What a thread does."""
        slots = [Slot(bool(self._copies)) for _ in range(SLOTS)]
        with suppress(RuntimeError):  # which the first piece then meets again
            slots[0].wait()  # while the first batch is planned
        with Files() as files:
            for slot in cycle(slots):
                if (job := self._jobs.get()) is None:
                    break
                batch, piece = job
                try:
                    _read(piece, slot, batch.copies, files)
                    batch.copied()
                except BaseException as error:
                    batch.done.put(error)
                del job, batch, piece  # their memory, which would wait for the next


def _read(piece: Piece, slot: Slot, copies: torch.Stream | None, files: Files) -> None:
    slot.wait()
    for run, start, place in piece.parts:
        run.read_into(slot.view[place], start, files)
    with copies or nullcontext():
        piece.into.copy_(slot.memory[: len(piece.into)], non_blocking=True)
        slot.copied = None if copies is None else copies.record_event()
