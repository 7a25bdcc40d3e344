"""What a kernel's plan launches for a Problem, over meta tensors: nothing is allocated, nothing runs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from ..device import Device
from ..dispatch_table import TABLE
from ..kernels._launch import Launch
from ..layouts import SKINNY, PackedWeight, pack, pad_rows
from ..problem import ACT_DTYPES, Problem
from ..tuning.table import tile_for
from ..weight import CODES_PER_WORD, QuantizedWeight
from .compile import Compiled, compile_launch


def launches(
    stem: str,
    problem: Problem,
    device: Device,
    tile: Any = None,
    *,
    bias: bool = False,
    ids: torch.dtype = torch.int64,
) -> tuple[Launch, ...]:
    """Every launch of kernel `stem` for `problem`; `tile` defaults to the one that tuning gives. ids: of experts."""
    plan = importlib.import_module(f"..kernels.{stem}", __package__).plan
    tile = tile_for(stem, problem, device) if tile is None else tile
    layout = next(row.layouts[0] for row in TABLE if row.stem == stem)
    packed = functools.partial(_weight, problem, device, layout)
    arguments = _moe_arguments(problem, packed, ids) if problem.experts else _linear_arguments(problem, packed, bias)
    planned: tuple[Launch, ...] = plan(**arguments, tile=tile)
    return planned


def compile_stem(
    stem: str, problem: Problem, device: Device, tile: Any = None, *, bias: bool = False
) -> tuple[Compiled, ...]:
    """The machine code of every launch of kernel `stem` for `problem` on `device`."""
    return tuple(compile_launch(launch, device) for launch in launches(stem, problem, device, tile, bias=bias))


def _linear_arguments(problem: Problem, packed: Callable[[int, int], PackedWeight], bias: bool) -> dict[str, Any]:
    return {
        "out": _activations(problem, problem.n),
        "x": _activations(problem, problem.k),
        "weight": packed(problem.n, problem.k),
        "bias": torch.empty(problem.n, dtype=ACT_DTYPES[problem.act], device="meta") if bias else None,
    }


def _moe_arguments(problem: Problem, packed: Callable[[int, int], PackedWeight], ids: torch.dtype) -> dict[str, Any]:
    """A gated layer with SiLU; its second GEMM takes the first one's group."""
    routed = (problem.m, problem.top_k)
    return {
        "out": _activations(problem, problem.k),
        "x": _activations(problem, problem.k),
        "w13": packed(problem.n, problem.k),
        "w2": packed(problem.k, problem.n // 2),
        "topk_weights": torch.empty(routed, dtype=torch.float32, device="meta"),
        "topk_ids": torch.empty(routed, dtype=ids, device="meta"),
        "activation": "silu",
        "gated": True,
        "weight_input": False,
    }


def _activations(problem: Problem, width: int) -> torch.Tensor:
    return torch.empty((problem.m, width), dtype=ACT_DTYPES[problem.act], device="meta")


def _weight(problem: Problem, device: Device, layout: str, n: int, k: int) -> PackedWeight:
    """As `pack` lays it out on that device; channel-wise when the group is all of K."""
    group = k if problem.group == problem.k else problem.group
    lead = (problem.experts,) if problem.experts else ()
    grid = (*lead, n, k // group)
    weight = QuantizedWeight(
        codes=torch.empty((*lead, n, k // CODES_PER_WORD), dtype=torch.int32, device="meta"),
        scales=torch.empty(grid, dtype=ACT_DTYPES[problem.act], device="meta"),
        zeros=torch.empty(grid, dtype=torch.uint8, device="meta") if problem.has_zeros else None,
        group=group,
    )
    packed = pack(weight, layout=layout)
    return pad_rows(packed) if layout == SKINNY and device.family == "gfx11" else packed
