"""What is timed of an expert layer: w4a16, each of its kernels by stem, and peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import layouts
from ..api import moe, pack_experts
from ..device import Device, current_device
from ..dispatch import choose, launcher
from ..dispatch_table import TABLE, Row
from ..errors import BadInput, explain_mismatch
from ..layouts import PackedWeight
from ..ops import _expert_linear
from ..problem import ACT_NAMES, Problem
from ..tuning.table import tile_for
from ..weight import QuantizedWeight
from . import expert_peers
from .expert_peers import Prepared, Weights
from .peers import Refuses, needs

HOW: dict[str, Any] = {"activation": "silu", "gated": True, "weight_input": False}


@dataclass(frozen=True, kw_only=True)
class ExpertProvider:
    """prepare(weights, act) packs; unsupported(problem, device) is a sentence or None.

    roundings   by how much the house bound on the error is multiplied: peers round gate, up and y too, dense ones w
    """

    name: str
    prepare: Callable[[Weights, torch.dtype], Prepared]
    unsupported: Refuses
    roundings: int = 1


def _w4a16(weights: Weights, act: torch.dtype) -> Prepared:
    packed = pack_experts(*weights, device=weights[0].codes.device, act=act)
    device = current_device(weights[0].codes.device)

    def gemms(x: Tensor, shares: Tensor, ids: Tensor) -> Callable[[], object]:
        choice = choose(problem_of(weights[0], x, ids), device, packed[0].layout)
        return _gemms(choice.row.stem, choice.tile, packed, x, shares, ids)

    return Prepared(layer=lambda x, shares, ids: moe(x, *packed, shares, ids), gemms=gemms if _plans(device) else None)


def _kernel(row: Row) -> ExpertProvider:
    """One of our kernels whatever dispatch would choose."""

    def prepare(weights: Weights, act: torch.dtype) -> Prepared:
        device = current_device(weights[0].codes.device)
        w13, w2 = (layouts.pack(weight, layout=row.layouts[0], act=act) for weight in weights)
        if row.layouts[0] == layouts.SKINNY and device.family == "gfx11":
            w13, w2 = layouts.pad_rows(w13), layouts.pad_rows(w2)

        def layer(x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
            out = torch.empty_like(x)
            tile = tile_for(row.stem, problem_of(weights[0], x, ids), device)
            given = {"w13": w13, "w2": w2, "topk_weights": shares, "topk_ids": ids, "linear": _expert_linear}
            launcher(row.stem)(out=out, x=x, **given, **HOW, tile=tile)
            return out

        def gemms(x: Tensor, shares: Tensor, ids: Tensor) -> Callable[[], object]:
            tile = tile_for(row.stem, problem_of(weights[0], x, ids), device)
            return _gemms(row.stem, tile, (w13, w2), x, shares, ids)

        return Prepared(layer=layer, gemms=gemms if _plans(device) else None)

    return ExpertProvider(name=row.stem, prepare=prepare, unsupported=row.unsupported)


def _plans(device: Device) -> bool:
    """Whether this device's kernels say what they launch."""
    return device.arch != "cpu"


def _gemms(
    stem: str, tile: Any, packed: tuple[PackedWeight, PackedWeight], x: Tensor, shares: Tensor, ids: Tensor
) -> Callable[[], object]:
    """Runs a plan once, so that rows are routed and every buffer is filled; then only its GEMMs."""
    plan = importlib.import_module(f"..kernels.{stem}", __package__).plan
    given = {"w13": packed[0], "w2": packed[1], "topk_weights": shares, "topk_ids": ids}
    planned = plan(out=torch.empty_like(x), x=x, **given, **HOW, tile=tile)
    for launch in planned:
        launch.run()
    products = [launch for launch in planned if launch.fn.__name__.startswith(f"_{stem}")]
    return lambda: [launch.run() for launch in products]


def problem_of(w13: QuantizedWeight, x: Tensor, ids: Tensor) -> Problem:
    return Problem(
        m=x.shape[0],
        n=w13.n,
        k=w13.k,
        group=w13.group,
        act=ACT_NAMES[x.dtype],
        has_zeros=w13.has_zeros,
        experts=w13.codes.shape[0],
        top_k=ids.shape[1],
    )


PROVIDERS: dict[str, ExpertProvider] = {
    provider.name: provider
    for provider in (
        ExpertProvider(name="w4a16", prepare=_w4a16, unsupported=lambda problem, device: None),
        ExpertProvider(
            name="grouped_mm", prepare=expert_peers.dense, unsupported=expert_peers.dense_unsupported, roundings=3
        ),
        ExpertProvider(name="humming", prepare=expert_peers.humming, unsupported=needs("humming"), roundings=3),
        *(_kernel(row) for row in TABLE if row.op == "moe"),
    )
}


def expert_providers_of(names: str) -> tuple[ExpertProvider, ...]:
    """Providers from a comma-separated list. Raises BadInput that lists them all when a name is none of them."""
    for name in names.split(","):
        if name not in PROVIDERS:
            wanted = ", ".join(PROVIDERS)
            raise BadInput(explain_mismatch("providers", got=name, wanted=wanted, then="Name some of these."))
    return tuple(PROVIDERS[name] for name in names.split(","))
