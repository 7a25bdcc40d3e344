"""What the tests share: random weights, the house bound on error, and what benchmarks/ holds."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from w4a16.device import known_device
from w4a16.problem import Problem
from w4a16.tuning.sm90_moe_tiles import Sm90MoeTile
from w4a16.tuning.tiles import why_illegal
from w4a16.weight import QuantizedWeight, pack_nibbles

# Relative RMS against the fp32 reference: the rounding of the output dtype, and of the scales' in it.
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def random_weight(
    n: int,
    k: int,
    *,
    group: int,
    asym: bool = False,
    act: torch.dtype = torch.bfloat16,
    experts: int = 0,
    act_order: bool = False,
) -> QuantizedWeight:
    lead = (experts,) if experts else ()
    grid = (*lead, n, k // group)
    perm = torch.stack([torch.randperm(k) for _ in range(experts or 1)]) if act_order else None
    return QuantizedWeight(
        codes=pack_nibbles(torch.randint(0, 16, (*lead, n, k))),
        scales=(torch.rand(grid) * 0.02 + 0.005).to(act),
        zeros=torch.randint(0, 16, grid, dtype=torch.uint8) if asym else None,
        group=group,
        perm=perm if perm is None or experts else perm[0],
    )


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """`wanted` is fp32; the bound is that of got's dtype."""
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    assert relative_rms(got, wanted) <= BOUNDS[got.dtype]


def benchmark(name: str) -> ModuleType:
    """benchmarks/<name>.py as a module."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def fitting(tile: Sm90MoeTile, problem: Problem) -> Sm90MoeTile:
    """The tile, or with fewer rows, programs an SM and stages, where no row of tuning gives the problem that tile."""
    if "residents must be 1" in (why_illegal("sm90_moe", tile, problem, known_device("sm90")) or ""):
        tile = replace(tile, residents=1)
    if tile.block_m == 128 and problem.group == 64:  # spills, and takes minutes to compile
        tile = replace(tile, block_m=64)
    while "shared memory" in (why_illegal("sm90_moe", tile, problem, known_device("sm90")) or ""):
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def in_turn(boxes: list[int], every: int) -> list[int]:
    """How sm90_moe takes blocks of so many boxes of rows: most first, one of a single box after `every` others."""
    wide = sorted((at for at, count in enumerate(boxes) if count > 1), key=lambda at: -boxes[at])
    narrow = [block for block, count in enumerate(boxes) if count == 1]
    order: list[int] = []
    while len(wide) >= every and narrow:
        order += [*wide[:every], narrow.pop(0)]
        wide = wide[every:]
    return order + wide + narrow
