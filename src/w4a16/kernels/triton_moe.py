"""triton_moe: an expert layer on any Triton GPU: two GEMMs over blocks of routed rows, then the sum over each token.

gemm1 gathers rows of x and applies the activation in its epilogue; rounds to x's dtype; gemm2 stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compat import dot, narrowed
from ..errors import Unsupported
from ..layouts import PackedWeight
from ..moe.route import MATRIX_ROWS, Route, choose_block, route
from ..tuning.tiles import MoeTile, capped_block_k
from ._dequant import dequantized
from ._launch import Launch, runs
from ._skinny import first_stride, pointers, strides
from ._token_sums import token_sums


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 x, or x itself for None."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(y)) / 2 = sigmoid(2 y)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit(do_not_specialize=["slots", "blocks_m"])
def _triton_moe(
    out_ptr,  # [slots, WIDTH]
    x_ptr,  # [slots / TOP_K, K]
    codes_ptr,  # [E, N, K//8] int32, layout SKINNY
    scales_ptr,  # [E, N, K//G]
    zeros_ptr,  # [E, ceil(N/8), K//G] int32, or None: every zero point is 8
    perm_ptr,  # [E, K] int64, or None
    shares_ptr,  # [slots], or None: what multiplies a row of x
    sorted_ptr,  # [blocks_m * ROUTED] int32: slots; padding is `slots` and more
    expert_ptr,  # [blocks_m] int32; -1: no work
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
    perm_expert,
    GROUP: tl.constexpr,
    DEQUANT: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_PERM: tl.constexpr,
    ROUTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RASTER: tl.constexpr,
):
    """A block of ROUTED slots times BLOCK_N rows of their expert; gated: a gate row and its up row side by side."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (RASTER * blocks_n)
    tall = tl.minimum(blocks_m - band * RASTER, RASTER)
    inside = tl.program_id(0) % (RASTER * blocks_n)
    block_m = band * RASTER + inside % tall
    n0 = inside // tall * BLOCK_N
    expert = tl.load(expert_ptr + block_m).to(tl.int64)
    if expert < 0:
        return

    lane = tl.arange(0, BLOCK_M)
    slot = tl.load(sorted_ptr + block_m * ROUTED + lane, mask=lane < ROUTED, other=slots)
    valid = slot < slots
    column = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
    n = column // 2 + column % 2 * (N // 2) if GATED else column
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (slot // TOP_K).to(tl.int64)[:, None] * x_stride
    codes_at = codes_ptr + expert * codes_expert + n[:, None] * codes_stride + tl.arange(0, BLOCK_K // 8)[None, :]
    scales_at = scales_ptr + expert * scales_expert + n * scales_stride
    if zeros_ptr is not None:
        zeros_at = zeros_ptr + expert * zeros_expert + n // 8 * zeros_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(K // BLOCK_K):
        group = step * BLOCK_K // GROUP
        channel = step * BLOCK_K + k
        if HAS_PERM:
            channel = tl.load(perm_ptr + expert * perm_expert + channel)
        x = tl.load(x_at + channel[None, :], mask=valid[:, None], other=0.0)
        words = tl.load(codes_at + step * (BLOCK_K // 8))
        scale = tl.load(scales_at + group)
        if zeros_ptr is not None:
            zero = (tl.load(zeros_at + group) >> (n % 8 * 4)) & 0xF
        else:
            zero = tl.full((BLOCK_N,), 8, tl.int32)
        w = tl.trans(dequantized(words, scale, zero, DEQUANT))
        if DEQUANT == "group_scale":
            part = dot(x, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            acc += part * scale.to(tl.float32)[None, :]
        else:
            acc = dot(x, w, acc)
    if shares_ptr is not None:
        acc *= tl.load(shares_ptr + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        y = _activated(gate, ACTIVATION) * up
        at = n0 // 2 + tl.arange(0, BLOCK_N // 2)
        inside_n = at < N // 2
    else:
        y = _activated(acc, ACTIVATION)
        at = n0 + tl.arange(0, BLOCK_N)
        inside_n = at < N
    out_at = out_ptr + slot.to(tl.int64)[:, None] * out_stride + at[None, :]
    tl.store(out_at, narrowed(y, out_ptr.dtype.element_ty), mask=valid[:, None] & inside_n[None, :])


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
    tile: MoeTile,
) -> tuple[Launch, ...]:
    """The launches of an expert layer, out [T, H]: gemm1, gemm2, sum. Routes at once; `linear` is unused here."""
    if tile.dequant == "group_sum":
        wanted = "a form without sums of x, such as group_scale"
        raise Unsupported(f"triton_moe: dequant is {tile.dequant}, must be {wanted}. Change the tuning row.")
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.group % MATRIX_ROWS:
            raise Unsupported(
                f"triton_moe: the group of {name} is {weight.group}, must be a multiple of {MATRIX_ROWS}. "
                "Requantise with another group."
            )
    tokens, top_k = topk_ids.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    ids, shares = topk_ids.contiguous(), topk_weights.contiguous()
    routing = route(ids, w13.experts, choose_block(tokens, top_k, w13.experts, tile.block_m))
    hidden = out.new_empty((tokens * top_k, w2.k))
    y = out.new_empty((tokens * top_k, w2.n), dtype=torch.float32)
    gemm1 = _gemm(hidden, x, w13, routing, shares if weight_input else None, top_k, activation, gated, tile)
    gemm2 = _gemm(y, hidden, w2, routing, None, 1, None, False, tile)
    sums = token_sums(out, y, ids, None if weight_input else shares, w13.experts)
    return gemm1, gemm2, sums


def _gemm(
    out: Tensor,
    x: Tensor,
    weight: PackedWeight,
    routing: Route,
    shares: Tensor | None,
    top_k: int,
    activation: str | None,
    gated: bool,
    tile: MoeTile,
) -> Launch:
    """out [slots, N or N/2] of the routed rows of x; a row of x serves `top_k` slots."""
    blocks_m = routing.expert_ids.numel()
    args = {
        **pointers(out, x, weight),
        "perm_ptr": weight.perm,
        "shares_ptr": shares,
        "sorted_ptr": routing.sorted_token_ids,
        "expert_ptr": routing.expert_ids,
        "slots": out.shape[0],
        "blocks_m": blocks_m,
        "N": weight.n,
        "K": weight.k,
        **strides(out, x, weight),
        "perm_expert": first_stride(weight.perm),
    }
    constants = {
        "GROUP": weight.group,
        "DEQUANT": tile.dequant,
        "TOP_K": top_k,
        "ACTIVATION": activation,
        "GATED": gated,
        "HAS_PERM": weight.perm is not None,
        "ROUTED": routing.block,
        "BLOCK_M": max(routing.block, MATRIX_ROWS),
        "BLOCK_N": tile.block_n,
        "BLOCK_K": capped_block_k(tile.block_k, weight.group),
        "RASTER": tile.group_m,
    }
    grid = (blocks_m * triton.cdiv(weight.n, tile.block_n),)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Launch(fn=_triton_moe, grid=grid, args=args, constants=constants, options=options)


triton_moe = runs(plan)
