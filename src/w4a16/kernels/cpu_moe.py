"""cpu_moe: an expert layer on the CPU, one expert that has tokens after another; nobody else's weights are touched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layouts import PackedWeight
from ..moe.activations import ACTIVATIONS


def cpu_moe(
    *,
    out: Tensor,
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    gated: bool,
    weight_input: bool,
    linear: Callable[[Tensor, PackedWeight], Tensor],
    tile: None,
) -> None:
    """out [T, H] = sum over slots of topk_weights * down(act(gate) * up), everything between the GEMMs in fp32.

    `linear` multiplies fp32 rows by one expert's weight, by the kernel of its row count. Ids outside 0..E-1 add
    nothing. Experts add to a token in the order of their ids, so the same routing gives the same bits.
    """
    act, top_k = ACTIVATIONS[activation], topk_ids.shape[1]
    ids, shares = topk_ids.flatten().long(), topk_weights.flatten().float()
    order = ids.argsort(stable=True)
    total = torch.zeros(out.shape, dtype=torch.float32)
    experts, counts = ids[order].unique_consecutive(return_counts=True)
    for expert, slots in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
        if not 0 <= expert < w13.experts:
            continue
        tokens, share = slots // top_k, shares[slots, None]
        rows = x[tokens].float()
        hidden = linear(rows * share if weight_input else rows, w13.expert(expert))
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = act(gate) * up
        else:
            hidden = act(hidden)
        y = linear(hidden, w2.expert(expert))
        total.index_add_(0, tokens, y if weight_input else y * share)
    out.copy_(total)
