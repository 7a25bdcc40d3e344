"""triton_decode: up to 16 rows of x times W^T, bound by the packed weight's way through memory, on any Triton GPU.

A program takes a few rows of W; the rows of x are padded to the 16 of one matrix instruction, and warps may share K.
K is also split over programs, whose sums meet in a second launch that adds them in their order: no atomics, and no
counter that an aborted launch could leave behind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compat import dot, narrowed
from ..layouts import PackedWeight
from ..tuning.tiles import DecodeTile, capped_block_k
from ._dequant import dequantized, magic_value
from ._launch import Launch, runs
from ._skinny import pointers, strides

MATRIX_ROWS = 16
SUM_BLOCK = 256


@triton.jit(do_not_specialize=["M"])
def _triton_decode(
    out_ptr,  # [M, N], or fp32 [SPLIT_K, M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N, K//8] int32, layout SKINNY
    scales_ptr,  # [N, K//G]
    zeros_ptr,  # [ceil(N/8), K//G] int32, or None: every zero point is 8
    bias_ptr,  # [N], or None
    M,
    N,
    K,
    out_stride,
    x_stride,
    codes_stride,
    scales_stride,
    zeros_stride,
    GROUP: tl.constexpr,
    DEQUANT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    AHEAD: tl.constexpr,
):
    ON_SUM: tl.constexpr = DEQUANT == "group_sum"
    STEP: tl.constexpr = GROUP if ON_SUM else BLOCK_K  # columns between two looks at the scales
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    split = tl.program_id(1)
    steps = tl.cdiv(K // STEP, SPLIT_K)
    rows = tl.arange(0, ROWS)
    # Rows past M are not read: as copies of one row they would all fall on one slice of the L2 cache.
    here = rows[None, :] < M
    x_at = x_ptr + rows[None, :] * x_stride + tl.arange(0, BLOCK_K)[:, None]
    codes_at = codes_ptr + row.to(tl.int64)[:, None] * codes_stride + tl.arange(0, BLOCK_K // 8)[None, :]
    scales_at = scales_ptr + row.to(tl.int64) * scales_stride
    if zeros_ptr is not None:
        zeros_at = zeros_ptr + (row // 8).to(tl.int64) * zeros_stride
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    first, end = split * steps, tl.minimum((split + 1) * steps, K // STEP)
    next_scale = tl.load(scales_at + tl.minimum(first, K // STEP - 1) * STEP // GROUP)
    if zeros_ptr is not None:
        next_zero = tl.load(zeros_at + tl.minimum(first, K // STEP - 1) * STEP // GROUP)
    for step in range(first, end):
        # Scales are too narrow for Triton's pipeline: with AHEAD they are asked for a step before their use.
        ahead = tl.minimum(step + AHEAD, K // STEP - 1) * STEP // GROUP
        scale = next_scale
        next_scale = tl.load(scales_at + ahead)
        if not AHEAD:
            scale = next_scale
        if zeros_ptr is not None:
            packed = next_zero
            next_zero = tl.load(zeros_at + ahead)
            if not AHEAD:
                packed = next_zero
            zero = (packed >> (row % 8 * 4)) & 0xF
        else:
            zero = tl.full((BLOCK_N,), 8, tl.int32)
        if ON_SUM:
            total = tl.zeros((BLOCK_N, ROWS), tl.float32)
            sums = tl.zeros((ROWS,), tl.float32)
            for k in tl.static_range(0, GROUP, BLOCK_K):
                x = tl.load(x_at + step * STEP + k, mask=here, other=0.0)
                words = tl.load(codes_at + step * (STEP // 8) + k // 8)
                total = dot(dequantized(words, scale, zero, DEQUANT), x, total)
                sums += tl.sum(x.to(tl.float32), 0)
            offset = zero.to(tl.float32) + magic_value(scale.dtype)
            acc += (total - offset[:, None] * sums[None, :]) * scale.to(tl.float32)[:, None]
        else:
            x = tl.load(x_at + step * STEP, mask=here, other=0.0)
            words = tl.load(codes_at + step * (STEP // 8))
            acc = dot(dequantized(words, scale, zero, DEQUANT), x, acc)
    m, n = rows[None, :], n[:, None]
    inside = (m < M) & (n < N)
    if SPLIT_K == 1:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + m * out_stride + n, narrowed(acc, out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + (split * M + m) * N + n, acc, mask=inside)


@triton.jit
def _add_splits(
    out_ptr,  # [M, N]
    parts_ptr,  # [SPLIT_K, M, N] fp32
    bias_ptr,  # [N], or None
    N,
    out_stride,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the splits, in their order."""
    m, n = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.num_programs(1) * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(parts_ptr + split * size + m * N + n, mask=n < N, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * out_stride + n, narrowed(total, out_ptr.dtype.element_ty), mask=n < N)


def plan(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: DecodeTile) -> tuple[Launch, ...]:
    """The launches of out [M, N] = x [M, K] @ W^T + bias for M up to 16; x already permuted for act-order."""
    m, n, group = x.shape[0], weight.n, weight.group
    parts = out.new_empty((tile.split_k, m, n), dtype=torch.float32) if tile.split_k > 1 else None
    product = Launch(
        fn=_triton_decode,
        grid=(triton.cdiv(n, tile.block_n), tile.split_k),
        args={
            **pointers(out if parts is None else parts, x, weight),
            "bias_ptr": bias if parts is None else None,
            "M": m,
            "N": n,
            "K": weight.k,
            **strides(out, x, weight),
        },
        constants={
            "GROUP": group,
            "DEQUANT": tile.dequant,
            "ROWS": MATRIX_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": capped_block_k(tile.block_k, group),
            "SPLIT_K": tile.split_k,
            "AHEAD": int(tile.stages > 1),
        },
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    if parts is None:
        return (product,)
    return product, _sum_launch(out, parts, bias)


def _sum_launch(out: Tensor, parts: Tensor, bias: Tensor | None) -> Launch:
    splits, m, n = parts.shape
    return Launch(
        fn=_add_splits,
        grid=(triton.cdiv(n, SUM_BLOCK), m),
        args={"out_ptr": out, "parts_ptr": parts, "bias_ptr": bias, "N": n, "out_stride": out.stride(0)},
        constants={"SPLIT_K": splits, "BLOCK": SUM_BLOCK},
        options={"num_warps": 4},
    )


triton_decode = runs(plan)
