"""dense: dequantise a block of weight rows into a reused buffer, then the vendor BLAS. Plain torch, any device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layouts import PackedWeight, unpack
from ..tuning.tiles import CpuTile


def dense(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: CpuTile) -> None:
    """out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    plain = replace(unpack(weight), perm=None)
    out.copy_(
        torch.nn.functional.linear(x.float(), plain.dequantize(torch.float32), None if bias is None else bias.float())
    )
