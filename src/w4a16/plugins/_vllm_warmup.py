"""Compiles the kernels of every row count before vLLM serves, so that no request waits for a compiler.

Triton compiles at a kernel's first call, about 2 s for one of Hopper's, and a model of four shapes has some 50. While
the model is built each layer says what it will be asked (`want`); when its weights are there, its first layer of each
kind is run once at each row count that has code of its own (`warm_up`). The first of these that is not in Triton's
cache on disk starts as many compilers as there are cores, for all layers at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from ..bench.warm import compile_all, distinct
from ..device import Device, known_device
from ..problem import Problem

TAIL = 500
IDS = torch.int32  # in which vLLM's routers name experts


@dataclass(frozen=True)
class Kind:
    """What one layer is asked, at one row."""

    problem: Problem
    bias: bool = False


_wanted: dict[Kind, int] = {}  # the most rows of one call
_warm: set[Kind] = set()
_ahead: set[Kind] = set()  # compiled by processes of their own


def want(kind: Kind) -> None:
    """A layer of the model that vLLM is building; nothing where vLLM was told to compile nothing ahead."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    if config.kernel_config.enable_jit_warmup:
        _wanted[kind] = config.scheduler_config.max_num_batched_tokens


@torch.no_grad()
def warm_up(kind: Kind, device: Device, call: Callable[[int], object], log: Callable[..., None]) -> None:
    """Calls `call` with each row count that has code of its own, once for each kind of layer."""
    if kind not in _wanted or kind in _warm or device.arch == "cpu":
        return
    from ..compat import compiled_anew

    _warm.add(kind)
    counts, began = row_counts(kind, _wanted[kind], device), time.monotonic()
    for m in counts:
        with compiled_anew() as names:
            call(m)
        if names and kind not in _ahead:
            compile_ahead(device, log)
    log("w4a16 ran %s at %d row counts in %.1f s", kind.problem, len(counts), time.monotonic() - began)


def row_counts(kind: Kind, most: int, device: Device) -> list[int]:
    """One row count for each code among 1 to `most`, the least that a search in steps of 8, later 16, finds."""
    counts = {*range(1, 129), *range(136, 513, 8), *range(528, most, 16), most}
    problems = [replace(kind.problem, m=m) for m in sorted(counts) if m <= most]
    return sorted({work[1].m for work in distinct(problems, device, bias=kind.bias)})


def compile_ahead(device: Device, log: Callable[..., None]) -> None:
    """Puts the code of all layers into Triton's cache. What fails here is compiled, or says why, in its own call."""
    began, kinds = time.monotonic(), [kind for kind in _wanted if kind not in _ahead]
    _ahead.update(kinds)
    asked = [[asdict(kind.problem), kind.bias, row_counts(kind, _wanted[kind], device)] for kind in kinds]
    # a worker of vLLM is a daemon, which multiprocessing gives no children
    command = [sys.executable, "-m", __name__, device.name]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        log("w4a16 compiles at first use: %s", done.stderr[-TAIL:])
        return
    log("w4a16 compiled %s kernels in %.1f s", done.stdout.strip(), time.monotonic() - began)


def main() -> None:
    device, compiled = known_device(sys.argv[1]), 0
    asked = [(Problem(**problem), bias, counts) for problem, bias, counts in json.load(sys.stdin)]
    for bias in sorted({bias for _, bias, _ in asked}):
        problems = [replace(problem, m=m) for problem, own, counts in asked if own == bias for m in counts]
        compiled += compile_all(problems, device, bias=bias, ids=IDS)
    print(compiled)


if __name__ == "__main__":
    main()
