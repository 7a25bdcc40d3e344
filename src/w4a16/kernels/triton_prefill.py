"""triton_prefill: x [M, K] @ W [N, K]^T on the matrix units of any Triton GPU, W dequantised tile by tile."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compat import dot, narrowed
from ..layouts import PackedWeight
from ..tuning.tiles import PrefillTile, capped_block_k
from ._dequant import dequantized, magic_value
from ._launch import Launch, runs
from ._skinny import first_stride, pointers, strides

SUM_BLOCK_M = 32
RASTER_M = 8  # blocks of M that walk over N together, so that a tile of W stays in the cache


@triton.jit(do_not_specialize=["M"])
def _group_sums(
    sums_ptr,  # [M, K//G] fp32
    x_ptr,  # [M, K]
    M,
    x_stride,
    sums_stride,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum of x over each group."""
    rows = tl.minimum(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    group = tl.program_id(1)
    at = x_ptr + rows[:, None] * x_stride + group * GROUP + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_M,), tl.float32)
    for _ in range(GROUP // BLOCK_K):
        total += tl.sum(tl.load(at).to(tl.float32), 1)
        at += BLOCK_K
    tl.store(sums_ptr + rows * sums_stride + group, total)


@triton.jit
def _product(x, w, acc, WEIGHT_FIRST: tl.constexpr):
    """acc + x @ w^T, or its transpose: then w may be a register operand of wgmma."""
    return dot(w, tl.trans(x), acc) if WEIGHT_FIRST else dot(x, tl.trans(w), acc)


@triton.jit
def _along_m(vector, WEIGHT_FIRST: tl.constexpr):
    """[BLOCK_M], shaped to spread over the accumulator."""
    return tl.expand_dims(vector, 0 if WEIGHT_FIRST else 1)


@triton.jit
def _along_n(vector, WEIGHT_FIRST: tl.constexpr):
    """[BLOCK_N], shaped to spread over the accumulator."""
    return tl.expand_dims(vector, 1 if WEIGHT_FIRST else 0)


@triton.jit(do_not_specialize=["M"])
def _triton_prefill(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N, K//8] int32, layout SKINNY
    scales_ptr,  # [N, K//G]
    zeros_ptr,  # [ceil(N/8), K//G] int32, or None: every zero point is 8
    bias_ptr,  # [N] or None
    sums_ptr,  # [M, K//G] fp32, of group_sum alone
    M,
    N,
    K,
    out_stride,
    x_stride,
    codes_stride,
    scales_stride,
    zeros_stride,
    sums_stride,
    GROUP: tl.constexpr,
    DEQUANT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PINNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL_K: tl.constexpr,
    RASTER: tl.constexpr,
    AHEAD: tl.constexpr,
):
    ON_SUM: tl.constexpr = DEQUANT == "group_sum" or DEQUANT == "group_scale"
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (RASTER * blocks_n)
    tall = tl.minimum(blocks_m - band * RASTER, RASTER)
    inside = tl.program_id(0) % (RASTER * blocks_n)
    m0 = (band * RASTER + inside % tall) * BLOCK_M
    n0 = inside // tall * BLOCK_N

    # Scalar bases move along K; the offsets within a tile stay. Rows past the end repeat the last one.
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - m0)
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)
    x_base = x_ptr + m0.to(tl.int64) * x_stride
    codes_base = codes_ptr + n0.to(tl.int64) * codes_stride
    scales_base = scales_ptr + n0.to(tl.int64) * scales_stride
    x_at = m[:, None] * x_stride + tl.arange(0, BLOCK_K)[None, :]
    codes_at = n[:, None] * codes_stride + tl.arange(0, BLOCK_K // 8)[None, :]
    scales_at = n * scales_stride
    if zeros_ptr is not None:
        zeros_at = (n0 + n) // 8 * zeros_stride
        zero_shift = (n0 + n) % 8 * 4
    SHAPE: tl.constexpr = (BLOCK_N, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, BLOCK_N)
    acc = tl.zeros(SHAPE, tl.float32)
    if ON_SUM:
        for group in range(K // GROUP):
            scale = tl.load(scales_base + scales_at)
            scales_base += 1
            if zeros_ptr is not None:
                zero = (tl.load(zeros_ptr + group + zeros_at) >> zero_shift) & 0xF
            else:
                zero = tl.full((BLOCK_N,), 8, tl.int32)
            if DEQUANT == "group_sum":
                sums = tl.load(sums_ptr + m0.to(tl.int64) * sums_stride + group + m * sums_stride)
                offset = -(zero.to(tl.float32) + magic_value(scale.dtype))
                total = _along_m(sums, WEIGHT_FIRST) * _along_n(offset, WEIGHT_FIRST)
            else:
                total = tl.zeros(SHAPE, tl.float32)
            for _ in range(GROUP // BLOCK_K // UNROLL_K):
                for _ in tl.static_range(UNROLL_K):
                    x = tl.load(x_base + x_at)
                    words = tl.load(codes_base + codes_at)
                    total = _product(x, dequantized(words, scale, zero, DEQUANT, PINNED), total, WEIGHT_FIRST)
                    x_base += BLOCK_K
                    codes_base += BLOCK_K // 8
            acc += total * _along_n(scale.to(tl.float32), WEIGHT_FIRST)
    else:
        next_scale = tl.load(scales_base + scales_at)
        if zeros_ptr is not None:
            next_zero = tl.load(zeros_ptr + zeros_at)
        for trip in range(K // BLOCK_K // UNROLL_K):
            for part in tl.static_range(UNROLL_K):
                # Scales are too narrow for Triton's pipeline: with AHEAD they are asked for a step before their use.
                step = trip * UNROLL_K + part
                ahead = tl.minimum(step + AHEAD, K // BLOCK_K - 1) * BLOCK_K // GROUP
                scale = next_scale
                next_scale = tl.load(scales_base + ahead + scales_at)
                if not AHEAD:
                    scale = next_scale
                if zeros_ptr is not None:
                    packed = next_zero
                    next_zero = tl.load(zeros_ptr + ahead + zeros_at)
                    if not AHEAD:
                        packed = next_zero
                    zero = (packed >> zero_shift) & 0xF
                else:
                    zero = tl.full((BLOCK_N,), 8, tl.int32)
                x = tl.load(x_base + x_at)
                words = tl.load(codes_base + codes_at)
                acc = _product(x, dequantized(words, scale, zero, DEQUANT, PINNED), acc, WEIGHT_FIRST)
                x_base += BLOCK_K
                codes_base += BLOCK_K // 8
    n = n0 + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        acc += _along_n(bias, WEIGHT_FIRST)
    rows = _along_m(m0 + tl.arange(0, BLOCK_M), WEIGHT_FIRST)
    columns = _along_n(n, WEIGHT_FIRST)
    at = out_ptr + rows.to(tl.int64) * out_stride + columns
    tl.store(at, narrowed(acc, out_ptr.dtype.element_ty), mask=(rows < M) & (columns < N))


def plan(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: PrefillTile) -> tuple[Launch, ...]:
    """The launches of out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    m, n, k, group = x.shape[0], weight.n, weight.k, weight.group
    block_k = capped_block_k(tile.block_k, group)
    on_sum = tile.dequant in ("group_sum", "group_scale")
    steps = (group if on_sum else k) // block_k
    launches: tuple[Launch, ...] = ()
    sums: Tensor | None = None
    if tile.dequant == "group_sum":
        sums = out.new_empty((m, k // group), dtype=torch.float32)
        launches = (_sums_launch(sums, x, group),)
    args = {
        **pointers(out, x, weight),
        "bias_ptr": bias,
        "sums_ptr": sums,
        "M": m,
        "N": n,
        "K": k,
        **strides(out, x, weight),
        "sums_stride": first_stride(sums),
    }
    constants = {
        "GROUP": group,
        "DEQUANT": tile.dequant,
        "WEIGHT_FIRST": tile.weight_first,
        "PINNED": tile.pinned,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "UNROLL_K": math.gcd(steps, tile.unroll_k),
        "RASTER": RASTER_M,
        "AHEAD": int(tile.ahead),
    }
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return (*launches, Launch(fn=_triton_prefill, grid=grid, args=args, constants=constants, options=options))


def _sums_launch(sums: Tensor, x: Tensor, group: int) -> Launch:
    return Launch(
        fn=_group_sums,
        grid=(triton.cdiv(x.shape[0], SUM_BLOCK_M), x.shape[1] // group),
        args={
            "sums_ptr": sums,
            "x_ptr": x,
            "M": x.shape[0],
            "x_stride": x.stride(0),
            "sums_stride": sums.stride(0),
        },
        constants={"GROUP": group, "BLOCK_M": SUM_BLOCK_M, "BLOCK_K": capped_block_k(256, group)},
        options={"num_warps": 4},
    )


triton_prefill = runs(plan)
