"""The fp32 truth in plain torch, from the plain weight. Imports no kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .moe.activations import ACTIVATIONS
from .weight import QuantizedWeight

__all__ = ["ACTIVATIONS", "reference_linear", "reference_moe"]


def reference_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """fp32 [..., N] = x [..., K] @ W^T + bias."""
    return F.linear(x.float(), weight.dequantize(torch.float32), None if bias is None else bias.float())


def reference_moe(
    x: Tensor,
    w13: QuantizedWeight,
    w2: QuantizedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    weight_input: bool = False,
) -> Tensor:
    """fp32 [T, H]: the expert layer, one token and one slot at a time. Ids outside 0..E-1 add nothing."""
    gate_up, down = w13.dequantize(torch.float32), w2.dequantize(torch.float32)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token in range(x.shape[0]):
        for slot in range(topk_ids.shape[1]):
            expert, share = int(topk_ids[token, slot]), topk_weights[token, slot].float()
            if not 0 <= expert < w13.experts:
                continue
            row = x[token].float() * (share if weight_input else 1.0)
            hidden = gate_up[expert] @ row
            if gated:
                gate, up = hidden.chunk(2)
                hidden = ACTIVATIONS[activation](gate) * up
            else:
                hidden = ACTIVATIONS[activation](hidden)
            out[token] += (down[expert] @ hidden) * (1.0 if weight_input else share)
    return out
