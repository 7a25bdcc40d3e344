"""Compiles what a benchmark is about to launch, in as many processes as there are cores: one alone takes minutes."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Iterable
from typing import Any

import torch

from ..device import Device, this_machine
from ..dispatch import choose
from ..problem import Problem

# Stem, problem, tile, device, which launch of the plan, bias, dtype of the experts' ids.
Work = tuple[str, Problem, Any, Device, int, bool, torch.dtype]
MOST_WORKERS = 16  # containers see all of a machine's cores, and have a few of them


def compile_all(
    problems: Iterable[Problem],
    device: Device,
    processes: int | None = None,
    *,
    bias: bool = False,
    ids: torch.dtype = torch.int64,
) -> int:
    """Puts the code of every kernel that dispatch launches for these problems into Triton's cache; how many there are.

    None on a CPU, whose kernels are compiled in the process that runs them.
    """
    if device.arch == "cpu":
        return 0
    work = distinct(problems, device, bias=bias, ids=ids)
    # Not forked: CUDA may be in use here. The server that workers are forked from has imported what they need.
    context = multiprocessing.get_context("forkserver")
    stems = {stem for stem, *_ in work}
    context.set_forkserver_preload(["w4a16.codegen.stems", *(f"w4a16.kernels.{stem}" for stem in stems)])
    workers = processes or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(functools.partial(_compile_one, here=this_machine().arch == device.arch), work))
    return len(work)


def distinct(
    problems: Iterable[Problem], device: Device, *, bias: bool = False, ids: torch.dtype = torch.int64
) -> list[Work]:
    """One launch for each code, those of the most instructions first, as they take longest."""
    from ..codegen.stems import launches

    found: dict[str, Work] = {}
    for problem in problems:
        choice = choose(problem, device)
        stem, tile = choice.row.stem, choice.tile
        for place, launch in enumerate(launches(stem, problem, device, tile, bias=bias, ids=ids)):
            free = {parameter.name for parameter in launch.fn.params if parameter.do_not_specialize}
            args = {name: _kind(value) for name, value in launch.args.items() if name not in free}
            code = repr((launch.fn.__name__, args, launch.constants, launch.options, launch.cluster))
            found.setdefault(code, (stem, problem, tile, device, place, bias, ids))
    return sorted(found.values(), key=lambda work: (work[4] > 0, -work[1].m))


def _kind(value: Any) -> object:
    """What Triton specialises on in a run-time argument over meta tensors."""
    if isinstance(value, int):
        return value == 1, value % 16 == 0
    if hasattr(value, "block_shape"):  # a descriptor of TMA
        return value.base.dtype, *value.block_shape, value.layout
    return value.dtype if hasattr(value, "dtype") else type(value)


def _compile_one(work: Work, here: bool) -> None:
    """here: on such a device, where what launches the kernel can be built, too."""
    from ..codegen.compile import compiled_kernel
    from ..codegen.stems import launches
    from ..compat import build_launcher

    stem, problem, tile, device, place, bias, ids = work
    kernel = compiled_kernel(launches(stem, problem, device, tile, bias=bias, ids=ids)[place], device)
    if here:
        build_launcher(kernel)
