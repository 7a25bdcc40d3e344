"""gfx11_moe: an expert layer by WMMA driven by hand: two GEMMs over blocks of routed rows, then the tokens' sums.

gemm1 gathers rows of x and applies the activation in its epilogue; rounds to x's dtype; gemm2 stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..compat import wmma_layout
from ..errors import Unsupported
from ..layouts import PackedWeight
from ..moe.route import MATRIX_ROWS, Route, choose_block, route
from ..tuning.gfx11_tiles import GROUPS, Gfx11Tile, paired_block_k
from ._gfx11 import accumulate, block_of_program, blocks_of, code_words_layout, group_sums, rows_layout, scales_layout
from ._launch import Launch, runs
from ._skinny import first_stride, pointers, strides
from ._token_sums import token_sums

RASTER_M = 4  # blocks of an expert's rows that walk over N together, so that a tile of W stays in the cache
GATHER_K = 256


@gluon.jit
def _sigmoid(x):
    """1 / (1 + 2^(-x / ln 2)) by the instructions for both, 1 ulp off each; an IEEE division alone takes ten."""
    power = gl.inline_asm_elementwise("v_exp_f32 $0, $1", "=v,v", [x * -1.4426950408889634], gl.float32, True, 1)
    return gl.inline_asm_elementwise("v_rcp_f32 $0, $1", "=v,v", [1.0 + power], gl.float32, True, 1)


@gluon.jit
def _activated(x, ACTIVATION: gl.constexpr):
    """The activation of fp32 x, or x itself for None."""
    if ACTIVATION == "silu":
        x = x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(y)) / 2 = sigmoid(2 y)
    elif ACTIVATION == "relu":
        x = gl.maximum(x, 0.0)
    return x


@gluon.jit
def _rows_of_slots(slot, slots, TOP_K: gl.constexpr):
    """The rows of x of a block's slots; padding repeats the last."""
    return (gl.minimum(slot, slots - 1).to(gl.uint32) // TOP_K).to(gl.int32)


@gluon.jit
def _rows_of_weight(column, n0, N, GATED: gl.constexpr, BLOCK_N: gl.constexpr):
    """The rows of W behind a block's columns; gated: gate rows in its first half, their up rows in the second."""
    HALF: gl.constexpr = BLOCK_N // 2
    if GATED:
        row = gl.minimum((n0 >> 1) + (column & HALF - 1), (N >> 1) - 1) + gl.where(column < HALF, 0, N >> 1)
    else:
        row = gl.minimum(n0 + column, N - 1)
    return row


@gluon.jit(do_not_specialize=["slots", "blocks_m"])
def _gfx11_moe(
    out_ptr,  # [slots, N or N/2]
    x_ptr,  # [slots / TOP_K, K]
    codes_ptr,  # [E, N, K//8] int32, layout SKINNY
    scales_ptr,  # [E, N, K//G]
    zeros_ptr,  # [E, ceil(N/8), K//G] int32, or None: every zero point is 8
    shares_ptr,  # [slots], or None: what multiplies a row of x
    sorted_ptr,  # [blocks_m * ROUTED] int32: slots; padding is `slots` and more
    expert_ptr,  # [blocks_m] int32; -1: no work
    sums_ptr,  # [K//G, rows of x] fp32, of group_sum alone
    slots,
    blocks_m,
    N,
    K,
    out_stride,
    x_stride,
    codes_expert,
    codes_stride,
    scales_expert,
    scales_stride,
    zeros_expert,
    zeros_stride,
    sums_stride,
    GROUP: gl.constexpr,
    DEQUANT: gl.constexpr,
    LDS_FEED: gl.constexpr,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    ROUTED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WARPS_N: gl.constexpr,
    RASTER: gl.constexpr,
):
    """A block of ROUTED slots times BLOCK_N rows of their expert."""
    SUMS: gl.constexpr = wmma_layout(1, WARPS_N)
    X: gl.constexpr = rows_layout(BLOCK_M, BLOCK_K, 8, WARPS_N)
    CODES: gl.constexpr = code_words_layout(BLOCK_N, BLOCK_K, 1, WARPS_N, LDS_FEED)
    SCALES: gl.constexpr = scales_layout(BLOCK_N, BLOCK_K, 1, WARPS_N, LDS_FEED, DEQUANT == "group_sum")
    ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)

    block_m, block_n = block_of_program(blocks_m.to(gl.uint32), blocks_of(N, BLOCK_N), RASTER)
    n0 = block_n * BLOCK_N
    expert = gl.load(expert_ptr + block_m).to(gl.int64)
    if expert < 0:
        return

    sorted_ptr += block_m * ROUTED
    x_lane = gl.arange(0, BLOCK_M, gl.SliceLayout(1, X))
    x_rows = _rows_of_slots(gl.load(sorted_ptr + x_lane, mask=x_lane < ROUTED, other=slots), slots, TOP_K)
    lane = gl.arange(0, BLOCK_M, ROWS)
    slot = gl.load(sorted_ptr + lane, mask=lane < ROUTED, other=slots)
    valid = slot < slots
    code_rows = _rows_of_weight(gl.arange(0, BLOCK_N, gl.SliceLayout(1, CODES)), n0, N, GATED, BLOCK_N)
    n = _rows_of_weight(gl.arange(0, BLOCK_N, SCALES), n0, N, GATED, BLOCK_N)
    zeros_base = zeros_ptr
    if zeros_ptr is not None:
        zeros_base += expert * zeros_expert
    acc = accumulate(
        x_ptr,
        x_rows[:, None] * x_stride + gl.arange(0, BLOCK_K, gl.SliceLayout(0, X))[None, :],
        codes_ptr + expert * codes_expert,
        code_rows[:, None] * codes_stride + gl.arange(0, BLOCK_K // 8, gl.SliceLayout(0, CODES))[None, :],
        scales_ptr + expert * scales_expert,
        n * scales_stride,
        zeros_base,
        (n >> 3) * zeros_stride,
        (n & 7) * 4,
        sums_ptr,
        _rows_of_slots(slot, slots, TOP_K),
        sums_stride,
        K,
        GROUP,
        DEQUANT,
        True,
        LDS_FEED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        1,
        WARPS_N,
    )
    if shares_ptr is not None:
        acc *= gl.load(shares_ptr + slot, mask=valid, other=0.0).to(gl.float32)[:, None]
    if GATED:
        WIDTH: gl.constexpr = BLOCK_N // 2
        halves = gl.permute(gl.reshape(acc, (BLOCK_M, 2, WIDTH)), (0, 2, 1))
        gate, up = gl.split(halves)  # of one lane: a warp's columns of the second half lie WIDTH behind
        y = gl.convert_layout(_activated(gate, ACTIVATION) * up, SUMS)
        column = (n0 >> 1) + gl.arange(0, WIDTH, gl.SliceLayout(0, SUMS))
        inside_n = column < N >> 1
    else:
        y = _activated(acc, ACTIVATION)
        column = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
        inside_n = column < N
    at = out_ptr + slot[:, None].to(gl.int64) * out_stride + column[None, :]
    gl.store(at, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & inside_n[None, :])


@triton.jit
def _gfx11_order(
    out_ptr,  # [slots, K]
    x_ptr,  # [slots / TOP_K, K]
    perm_ptr,  # [E, K] int64
    ids_ptr,  # [slots]
    K,
    x_stride,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Each slot's row of x in the order of its expert's columns (act-order)."""
    slot = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    inside = (k < K) & (expert >= 0) & (expert < EXPERTS)
    channel = tl.load(perm_ptr + expert * K + k, mask=inside, other=0)
    x = tl.load(x_ptr + slot // TOP_K * x_stride + channel, mask=inside, other=0.0)
    tl.store(out_ptr + slot * K + k, x, mask=k < K)


def _gemm(
    out: Tensor,
    x: Tensor,
    weight: PackedWeight,
    ids: Tensor,
    routing: Route,
    shares: Tensor | None,
    top_k: int,
    activation: str | None,
    gated: bool,
    tile: Gfx11Tile,
) -> tuple[Launch, ...]:
    """out [slots, N or N/2] of the routed rows of x; a row of x serves `top_k` slots."""
    before: tuple[Launch, ...] = ()
    if weight.perm is not None:
        x, order = _ordered(x, weight, ids, top_k)
        before, top_k = (order,), 1
    sums: Tensor | None = None
    if tile.dequant == "group_sum":
        sums, launch = group_sums(x, weight.group, MATRIX_ROWS)
        before = (*before, launch)
    blocks_m = routing.expert_ids.numel()
    args = {
        **pointers(out, x, weight),
        "shares_ptr": shares,
        "sorted_ptr": routing.sorted_token_ids,
        "expert_ptr": routing.expert_ids,
        "sums_ptr": sums,
        "slots": out.shape[0],
        "blocks_m": blocks_m,
        "N": weight.n,
        "K": weight.k,
        **strides(out, x, weight),
        "sums_stride": first_stride(sums),
    }
    constants = {
        "GROUP": weight.group,
        "DEQUANT": tile.dequant,
        "LDS_FEED": tile.feed == "lds",
        "TOP_K": top_k,
        "ACTIVATION": activation,
        "GATED": gated,
        "ROUTED": routing.block,
        "BLOCK_M": max(routing.block, MATRIX_ROWS),
        "BLOCK_N": tile.block_n,
        "BLOCK_K": paired_block_k(tile.block_k, weight.k, weight.group),
        "WARPS_N": tile.warps_n,
        "RASTER": RASTER_M,
    }
    grid = (blocks_m * triton.cdiv(weight.n, tile.block_n),)
    options = {"num_warps": tile.warps}
    return (*before, Launch(fn=_gfx11_moe, grid=grid, args=args, constants=constants, options=options))


def _ordered(x: Tensor, weight: PackedWeight, ids: Tensor, top_k: int) -> tuple[Tensor, Launch]:
    """A workspace [slots, K], and the launch that fills it."""
    assert weight.perm is not None
    out = x.new_empty((ids.numel(), weight.k))
    return out, Launch(
        fn=_gfx11_order,
        grid=(ids.numel(), triton.cdiv(weight.k, GATHER_K)),
        args={
            "out_ptr": out,
            "x_ptr": x,
            "perm_ptr": weight.perm,
            "ids_ptr": ids,
            "K": weight.k,
            "x_stride": x.stride(0),
        },
        constants={"EXPERTS": weight.experts, "TOP_K": top_k, "BLOCK_K": GATHER_K},
        options={"num_warps": 4},
    )


def plan(
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
    linear: Callable[[Tensor, PackedWeight], Tensor] | None = None,
    tile: Gfx11Tile,
) -> tuple[Launch, ...]:
    """The launches of an expert layer, out [T, H]: gemm1, gemm2, sum. Routes at once; `linear` is unused here."""
    if w2.group not in GROUPS:
        wanted = ", ".join(map(str, GROUPS))
        raise Unsupported(f"gfx11_moe: the group of w2 is {w2.group}, must be {wanted}. Set W4A16_KERNEL=triton_moe.")
    tokens, top_k = topk_ids.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    ids, shares = topk_ids.contiguous(), topk_weights.contiguous()
    routing = route(ids, w13.experts, choose_block(tokens, top_k, w13.experts, tile.block_m))
    hidden = out.new_empty((tokens * top_k, w2.k))
    y = out.new_empty((tokens * top_k, w2.n), dtype=torch.float32)
    first_shares, last_shares = (shares, None) if weight_input else (None, shares)
    return (
        *_gemm(hidden, x, w13, ids, routing, first_shares, top_k, activation, gated, tile),
        *_gemm(y, hidden, w2, ids, routing, None, 1, None, False, tile),
        token_sums(out, y, ids, last_shares, w13.experts),
    )


gfx11_moe = runs(plan)
