"""Runs a compiled task on torch's own threads, and what the CPU launchers share around it.

torch's OpenMP pool is entered through the one function of the OpenMP runtime that starts a parallel region, so that
our kernels and torch's share their threads: two pools would fight over the cores. Where the runtime does not offer it
(macOS, Windows), a pool of Python threads stands in.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

_Task = ctypes.CFUNCTYPE(None, ctypes.c_int64)
WORTH_THREADS = 1 << 19  # multiply-adds below which starting threads costs more than it saves


def threads_for(m: int, n: int, k: int) -> int:
    return torch.get_num_threads() if m * n * k >= WORTH_THREADS else 1


def rows_a_chunk(n: int, block_n: int, threads: int, tile_n: int) -> int:
    """Whole tiles of tile_n rows: block_n of them, or fewer where a thread would get less than four chunks."""
    return max(min(block_n, -(-n // (4 * threads))) // tile_n, 1) * tile_n


def out_scratch(out: Tensor, bias: Tensor | None, tile_m: int, tile_n: int) -> Tensor:
    """`out` when the sums can go straight into it, else fp32 scratch of whole tiles, for `finish`."""
    m, n = out.shape
    whole = m % tile_m == 0 and n % tile_n == 0
    if whole and bias is None and out.dtype == torch.float32 and out.stride(1) == 1:
        return out
    return torch.empty((-(-m // tile_m) * tile_m, -(-n // tile_n) * tile_n))


def finish(out: Tensor, acc: Tensor, bias: Tensor | None) -> None:
    """out = acc + bias, rounded once."""
    if acc is out:
        return
    acc = acc[: out.shape[0], : out.shape[1]]
    if bias is None:
        out.copy_(acc)
    else:
        torch.add(acc, bias, out=out)


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(task, argument, threads, flags) of the runtime that torch is linked to."""
    for library in (Path(torch.__path__[0]) / "lib").glob("libtorch_cpu.*"):
        try:
            start = ctypes.CDLL(os.fspath(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        start.restype = None
        return start
    return None


@functools.cache
def _python_threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="w4a16")


def run(task: int, args: ctypes.Structure, threads: int) -> None:
    """Calls the compiled function at address `task` with the address of `args`, once on each of `threads` threads."""
    address = ctypes.addressof(args)
    start = _openmp() if threads > 1 else None
    if start is not None:
        start(task, address, threads, 0)
        return
    call = _Task(task)
    others = [_python_threads(threads - 1).submit(call, address) for _ in range(threads - 1)]
    call(address)
    for other in others:
        if not other.cancel():  # one that has not begun would find no chunk left
            other.result()
