"""Modules and tensors of a checkpoint in the order of their use, read ahead of it by threads, straight onto a GPU.

Threads read files into pinned memory while the GPU copies and transforms what came before: codes are brought into
their plain form, checked and packed where they are used. A CPU gains nothing from threads and reads one by one.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from ..errors import BadInput, explain_mismatch
from ..weight import QuantizedWeight
from .base import Plan
from .reader import Checkpoint
from .shards import DTYPES, Entry

READERS = 4  # one thread copies 2 to 6 GB/s out of the page cache, less than PCIe takes
PIECE_BYTES = 32 << 20  # read and copied at a time: torch keeps pinned blocks of this size, and pins none of a GB
AHEAD_BYTES = 256 << 20  # of pinned memory that waits for its use, at least one piece


@dataclass(frozen=True)
class Fetched(Entry):
    """A tensor of a file that lies on its device already."""

    values: Tensor

    def read(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class Piece:
    """Bytes start..stop of a stored tensor, being read into host memory."""

    start: int
    stop: int
    memory: Future[Tensor]


class Stream:
    """`items` are (name, device) of quantised modules and dense tensors; they must be asked for in this order.

    Use it as a context manager: leaving it, for whatever reason, stops the threads.
    """

    def __init__(
        self, checkpoint: Checkpoint, items: Sequence[tuple[str, torch.device]], *, readers: int | None = None
    ) -> None:
        self.path = checkpoint.path
        self._checkpoint = checkpoint
        self._items = deque(items)
        on_gpu = any(device.type == "cuda" for _, device in items)
        readers = READERS * on_gpu if readers is None else readers
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="w4a16-read") if readers else None
        self._pinned = on_gpu
        self._to_read = _spans(checkpoint, [name for name, _ in items])
        self._waiting: deque[Piece] = deque()
        self._waiting_bytes = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._waiting.clear()

    def plan(self, module: str) -> Plan:
        return self._checkpoint.plan(module)

    def weight(self, module: str) -> QuantizedWeight:
        """The next item, a quantised module, its values checked, on its device."""
        return self._checkpoint.weight(module, self._next(module))

    def tensor(self, name: str) -> Tensor:
        """The next item, a dense tensor, on its device."""
        return self._next(name)[""].read()

    def _next(self, name: str) -> dict[str, Entry]:
        wanted, device = self._items[0] if self._items else ("the end", torch.device("cpu"))
        if name != wanted:
            then = "Ask for the items in the order they were given."
            raise BadInput(explain_mismatch(f"{self.path}: next of the stream", got=name, wanted=wanted, then=then))
        self._items.popleft()
        entries = self._checkpoint.entries(name)
        if self._pool is None:
            return entries
        return {suffix: self._fetch(self._pool, entry, device) for suffix, entry in entries.items()}

    def _fetch(self, pool: ThreadPoolExecutor, entry: Entry, device: torch.device) -> Entry:
        values = torch.empty(entry.nbytes, dtype=torch.uint8, device=device)
        done = 0
        while done < entry.nbytes:
            self._read_ahead(pool)
            piece = self._waiting.popleft()
            self._waiting_bytes -= piece.stop - piece.start
            # torch gives a pinned block out again only when the copies from it are done
            values[piece.start : piece.stop].copy_(piece.memory.result(), non_blocking=True)
            done = piece.stop
        shaped = values.view(DTYPES[entry.dtype]).view(entry.shape)
        return Fetched(entry.name, entry.file, entry.dtype, entry.shape, entry.start, shaped)

    def _read_ahead(self, pool: ThreadPoolExecutor) -> None:
        """Asks the threads for pieces until as many bytes wait as may, and for the next one in any case."""
        while not self._waiting or self._waiting_bytes < AHEAD_BYTES:
            entry, start, stop = next(self._to_read, (None, 0, 0))
            if entry is None:
                return
            self._waiting.append(Piece(start, stop, pool.submit(_read, entry, start, stop, self._pinned)))
            self._waiting_bytes += stop - start


def _spans(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[tuple[Entry, int, int]]:
    """The bytes of every stored tensor of `names`, in their order, cut into pieces."""
    for name in names:
        for entry in checkpoint.entries(name).values():
            for start in range(0, entry.nbytes, PIECE_BYTES):
                yield entry, start, min(start + PIECE_BYTES, entry.nbytes)


def _read(entry: Entry, start: int, stop: int, pinned: bool) -> Tensor:
    memory = torch.empty(stop - start, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    view = (ctypes.c_ubyte * (stop - start)).from_address(memory.data_ptr())
    entry.read_into(memoryview(view).cast("B"), start)
    return memory
