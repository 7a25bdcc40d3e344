"""dense: dequantise a block of weight rows into a reused buffer, then the vendor BLAS. Plain torch, any device.

A CPU computes in fp32, as few have fast 16-bit BLAS; a GPU in the activation dtype, on its matrix units.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layouts import INT4PACK, INT4PACK_ROWS, SKINNY, PackedWeight, int4pack_group, int4pack_rows, unpack
from ..tuning.tiles import CpuTile
from ..weight import SYMMETRIC_ZERO


def dense(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: CpuTile) -> None:
    """out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    dtype = torch.float32 if x.device.type == "cpu" else weight.act
    rows = x.to(dtype)
    block = _block_int4pack if weight.layout == INT4PACK else _block
    for start in range(0, weight.n, tile.block_n):
        stop = min(start + tile.block_n, weight.n)
        y = torch.mm(rows, block(weight, start, stop, dtype))
        out[:, start:stop] = y if bias is None else y + bias[start:stop]


def _block(weight: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """W[start:stop]^T of a layout whose rows are rows."""
    zeros = weight.zeros
    if zeros is not None:
        zeros = zeros[start // 8 : -(-stop // 8)] if weight.layout == SKINNY else zeros[start:stop]
    codes, scales = weight.codes[start:stop], weight.scales[start:stop]
    part = replace(weight, n=stop - start, codes=codes, scales=scales, zeros=zeros, perm=None)
    return unpack(part).dequantize(dtype).t()


def _block_int4pack(weight: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """W[start:stop]^T: in INT4PACK a block of rows lies column by column, so the transpose comes for free."""
    rows = int4pack_rows()
    half, groups = rows.shape[1], weight.k // weight.group
    stored = -(-(stop - start) // INT4PACK_ROWS) * INT4PACK_ROWS
    columns = weight.codes[start : start + stored].view(-1, weight.k, half).transpose(0, 1)
    values = torch.empty((*columns.shape[:2], 2 * half), dtype=dtype)
    values[:, :, _as_slice(rows[0])] = columns & 15
    values[:, :, _as_slice(rows[1])] = columns >> 4
    values = values.view(groups, weight.group, -1)[:, :, : stop - start]
    repeats = weight.group // int4pack_group(weight.group)
    scales = weight.scales[::repeats, None, start:stop, 0].to(dtype)
    zeros = SYMMETRIC_ZERO if weight.zeros is None else weight.zeros[start:stop].t()[:, None].to(dtype)
    return torch.addcmul(-zeros * scales, values, scales).flatten(0, 1)


def _as_slice(places: Tensor) -> slice:
    first, step = int(places[0]), int(places[1] - places[0])
    return slice(first, first + step * len(places), step)
