"""cpu_int4pack: torch's own int4 kernel, bf16 in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import PackedWeight, int4pack_group


def cpu_int4pack(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: None) -> None:
    """out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    group = int4pack_group(weight.group)
    rows = x.to(torch.bfloat16).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight.codes, group, weight.scales)[:, : weight.n]
    if bias is None:
        out.copy_(y)
    else:
        torch.add(y, bias, out=out)
