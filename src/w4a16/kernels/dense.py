"""dense: dequantise a block of weight rows into a reused buffer, then the vendor BLAS. Plain torch, any device.

A CPU computes in fp32, as few have fast 16-bit BLAS; a GPU in the activation dtype, on its matrix units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..layouts import INT4PACK, INT4PACK_ROWS, SKINNY, PackedWeight, int4pack_group, int4pack_rows, unpack
from ..tuning.tiles import CpuTile
from ..weight import SYMMETRIC_ZERO


def dense(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: CpuTile) -> None:
    """out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    multiply = _int4pack_products if weight.layout == INT4PACK else _products
    for start, stop, y in multiply(x, weight, tile.block_n):
        out[:, start:stop] = y if bias is None else y + bias[start:stop]


def _products(x: Tensor, weight: PackedWeight, block_n: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, x @ W[start:stop]^T) of a layout whose rows are rows."""
    dtype = torch.float32 if x.device.type == "cpu" else weight.act
    x = x.to(dtype)
    for start in range(0, weight.n, block_n):
        stop = min(start + block_n, weight.n)
        yield start, stop, torch.mm(x, _block(weight, start, stop, dtype))


def _block(weight: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """W[start:stop]^T of a layout whose rows are rows."""
    zeros = weight.zeros
    if zeros is not None:
        zeros = zeros[start // 8 : -(-stop // 8)] if weight.layout == SKINNY else zeros[start:stop]
    codes, scales = weight.codes[start:stop], weight.scales[start:stop]
    part = replace(weight, n=stop - start, codes=codes, scales=scales, zeros=zeros, perm=None)
    return unpack(part).dequantize(dtype).t()


def _int4pack_products(x: Tensor, weight: PackedWeight, block_n: int) -> Iterator[tuple[int, int, Tensor]]:
    """The same: in INT4PACK a block of rows lies column by column, so the transpose comes for free.

    W is q*s - z*s; the second term meets the sums of x over the groups, so that no pass over W is spent on it.
    """
    rows, groups = int4pack_rows(), weight.k // weight.group
    half, low, high = rows.shape[1], _as_slice(rows[0]), _as_slice(rows[1])
    x = x.float()
    sums = x.unflatten(1, (groups, -1)).sum(-1)
    repeats = weight.group // int4pack_group(weight.group)
    block_n = -(-block_n // INT4PACK_ROWS) * INT4PACK_ROWS
    # One buffer for all blocks: each would have to fault in fresh pages.
    buffer = x.new_empty(min(block_n, len(weight.codes)) * weight.k)
    for start in range(0, len(weight.codes), block_n):
        columns = weight.codes[start : start + block_n].view(-1, weight.k, half).transpose(0, 1)
        stored, stop = columns.shape[1] * 2 * half, min(start + block_n, weight.n)
        values = buffer[: weight.k * stored].view(weight.k, -1, 2 * half)
        values[:, :, low] = columns & 15
        values[:, :, high] = columns >> 4
        scales = weight.scales[::repeats, start : start + stored, 0].float()
        zeros = SYMMETRIC_ZERO if weight.zeros is None else weight.zeros[start:stop].t().float()
        values.view(groups, weight.group, stored).mul_(scales[:, None])
        shift = torch.mm(sums, zeros * scales[:, : stop - start])
        yield start, stop, torch.mm(x, values.view(weight.k, stored))[:, : stop - start].sub_(shift)


def _as_slice(places: Tensor) -> slice:
    first, step = int(places[0]), int(places[1] - places[0])
    return slice(first, first + step * len(places), step)
