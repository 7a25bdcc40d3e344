"""dense_resident: the vendor BLAS over the dequantised copy that dense_cache made at load. Plain torch, any device."""

from __future__ import annotations

from torch import Tensor

from ..layouts import PackedWeight
from ..tuning.tiles import ResidentTile
from ._blas import multiply


def dense_resident(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: ResidentTile) -> None:
    """out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order, as the copy's columns are."""
    assert weight.dense is not None
    multiply(out, x, weight.dense, bias)
