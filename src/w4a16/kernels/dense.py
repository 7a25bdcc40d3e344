"""dense: rows of W are dequantised into a workspace of bounded size, then the vendor BLAS. Any device.

Nothing stays resident: the workspace is asked of torch's allocator at every call, which hands the same memory to the
next layer and keeps streams, threads and captured graphs apart. A GPU dequantises in one Triton kernel and computes in
the activation dtype, on its matrix units; a CPU computes in fp32, as few have fast 16-bit BLAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..device import installed
from ..layouts import EXLLAMA, INT4PACK, INT4PACK_ROWS, SKINNY, PackedWeight, int4pack_group, int4pack_rows, unpack
from ..tuning.tiles import DENSE_ROWS, DenseTile
from ..weight import CODES_PER_WORD, SYMMETRIC_ZERO, QuantizedWeight
from ._blas import multiply


def dense(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: DenseTile) -> None:
    """out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    dtype = torch.float32 if x.device.type == "cpu" else weight.act
    block_n = block_rows(tile, weight.k, dtype)
    if weight.layout == INT4PACK:
        for start, stop, y in _int4pack_products(x, weight, block_n):
            out[:, start:stop] = y if bias is None else y + bias[start:stop]
        return
    values = x.to(dtype)
    workspace = values.new_empty((min(block_n, weight.n), weight.k))
    for start in range(0, weight.n, block_n):
        stop = min(start + block_n, weight.n)
        rows = workspace[: stop - start]
        dequantize_rows(rows, weight, start)
        multiply(out[:, start:stop], values, rows, None if bias is None else bias[start:stop])


def block_rows(tile: DenseTile, k: int, dtype: torch.dtype) -> int:
    """Rows of W that the workspace holds: a multiple of DENSE_ROWS, at least one."""
    return max(1, (tile.workspace_mib << 20) // (k * dtype.itemsize * DENSE_ROWS)) * DENSE_ROWS


def dequantize_rows(out: Tensor, weight: PackedWeight, start: int) -> None:
    """Rows start.. of W, columns as in the codes, as many as `out` [rows, K] has; start is a multiple of 8."""
    stop = start + len(out)
    if _by_triton(weight):
        from ._dense_rows import dense_rows

        dense_rows(out, weight, start).run()
        return
    zeros = weight.zeros
    if zeros is not None:
        zeros = zeros[start // 8 : -(-stop // 8)] if weight.layout == SKINNY else zeros[start:stop]
    codes, scales = weight.codes[start:stop], weight.scales[start:stop]
    part = replace(weight, n=stop - start, codes=codes, scales=scales, zeros=zeros, perm=None)
    out.copy_(unpack(part).dequantize(out.dtype))


def _by_triton(weight: PackedWeight) -> bool:
    on_gpu = weight.layout == SKINNY and weight.codes.device.type == "cuda"
    return on_gpu and weight.group % CODES_PER_WORD == 0 and installed("triton")


def dequantize_all(out: Tensor, weight: PackedWeight, block_n: int) -> None:
    """All of W into `out` [N, K], columns as in the codes, block_n rows at a time (a multiple of 8)."""
    if weight.layout in (EXLLAMA, SKINNY):
        for start in range(0, weight.n, block_n):
            dequantize_rows(out[start : start + block_n], weight, start)
        return
    plain = unpack(replace(weight, perm=None))
    for start in range(0, weight.n, block_n):
        part = slice(start, start + block_n)
        zeros = None if plain.zeros is None else plain.zeros[part]
        rows = QuantizedWeight(codes=plain.codes[part], scales=plain.scales[part], zeros=zeros, group=plain.group)
        out[part] = rows.dequantize(out.dtype)


def _int4pack_products(x: Tensor, weight: PackedWeight, block_n: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, x @ W[start:stop]^T): in INT4PACK a block of rows lies column by column, so W^T comes for free.

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
