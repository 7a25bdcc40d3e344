"""Expert layers of others, beside which ours are timed: grouped GEMMs over dense weights, and Humming's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..moe.route import Route, moe_align_block_size, route
from ..problem import Problem
from ..weight import QuantizedWeight
from . import peers

Weights = tuple[QuantizedWeight, QuantizedWeight]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Gemms = Callable[[Tensor, Tensor, Tensor], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One packed expert layer.

    layer   (x, shares, ids) -> y, all that follows the router
    gemms   (x, shares, ids) -> a function that repeats its GEMMs alone; None where they cannot be told apart
    """

    layer: Layer
    gemms: Gemms | None = None


def grouped_mm(x: Tensor, w13: Tensor, w2: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
    """The same layer over dense weights [E, 2I, H] and [E, H, I]: sort, two grouped GEMMs, weighted sum."""
    tokens, top_k = ids.shape
    order, ends = _sorted(ids, len(w13))
    gate, up = _grouped(x[order // top_k], w13, ends).chunk(2, dim=-1)
    y = _grouped(torch.nn.functional.silu(gate) * up, w2, ends)
    slots = torch.empty_like(y).index_copy_(0, order, y)
    return (slots.view(tokens, top_k, -1).float() * shares.unsqueeze(-1)).sum(1).to(x.dtype)


def _sorted(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Slots in the order of their experts, and where each expert's end."""
    key, order = ids.flatten().sort(stable=True)
    return order, torch.searchsorted(key, torch.arange(experts, device=ids.device), right=True).to(torch.int32)


def _grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)


def dense(weights: Weights, act: torch.dtype) -> Prepared:
    w13, w2 = (weight.dequantize(act) for weight in weights)

    def gemms(x: Tensor, shares: Tensor, ids: Tensor) -> Callable[[], object]:
        order, ends = _sorted(ids, len(w13))
        rows = x[order // ids.shape[1]]
        hidden = _grouped(rows, w13, ends)[:, : w2.shape[-1]].contiguous()
        return lambda: (_grouped(rows, w13, ends), _grouped(hidden, w2, ends))

    return Prepared(layer=lambda x, shares, ids: grouped_mm(x, w13, w2, shares, ids), gemms=gemms)


def dense_unsupported(problem: Problem, device: Device) -> str | None:
    if not hasattr(torch, "_grouped_mm"):
        return "this torch has no _grouped_mm"
    return None if problem.act == "bf16" else f"activations must be bf16, not {problem.act}"


def humming(weights: Weights, act: torch.dtype) -> Prepared:
    """Its GEMMs over routed rows; SiLU and the weighted sum are torch's, so that `gemms` compares, not `layer`."""
    first, second = (peers.humming_layer(weight, act) for weight in weights)

    def routed(layer: Any, ids: Tensor) -> Route:
        from humming.tune import get_heuristics_config

        config = get_heuristics_config(layer.humming_config, ids.numel(), gemm_type="indexed", device=ids.device)
        block = config["block_shape"][0]
        align = moe_align_block_size if block & (block - 1) else route
        return align(ids, layer.num_experts, block)

    def hidden_of(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def layer(x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        tokens, top_k = ids.shape
        hidden = hidden_of(_indexed(first, x, routed(first, ids), top_k))
        slots = _indexed(second, hidden, routed(second, ids), 1)
        return (slots.view(tokens, top_k, -1).float() * shares.unsqueeze(-1)).sum(1).to(x.dtype)

    def gemms(x: Tensor, shares: Tensor, ids: Tensor) -> Callable[[], object]:
        routes, top_k = (routed(first, ids), routed(second, ids)), ids.shape[1]
        hidden = hidden_of(_indexed(first, x, routes[0], top_k))
        return lambda: (_indexed(first, x, routes[0], top_k), _indexed(second, hidden, routes[1], 1))

    return Prepared(layer=layer, gemms=gemms)


def _indexed(layer: Any, x: Tensor, routing: Route, top_k: int) -> Tensor:
    """[slots, N] of the rows slot // top_k of x."""
    out: Tensor = layer(
        x,
        sorted_ids=routing.sorted_token_ids,
        expert_ids=routing.expert_ids,
        num_tokens_padded=routing.num_tokens_post_padded,
        top_k=top_k,
        compute_config={"gemm_type": "indexed"},
    )
    return out
