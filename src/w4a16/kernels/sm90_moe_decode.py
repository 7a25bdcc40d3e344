"""sm90_moe_decode: experts with up to 16 rows a block on Hopper; codes go from memory straight into mma.sync.

As sm90_decode, for the rows that routing sends to one expert. Each warp multiplies 16 rows of W; the first half of a
gated program's warps have gate rows, the others the up rows that belong to them. The programs of a cluster share K, or
hold the experts of one token, whose sum then needs no launch of its own.
"""

# mypy: disable-error-code="assignment, misc, var-annotated, unreachable"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..compat import copy_to_shared, told_registers, workgroup_barrier
from ..layouts import PackedWeight
from ..moe.route import Route
from ..tuning.sm90_decode_tiles import decode_spare_kib
from ..tuning.sm90_tiles import Sm90DecodeTile, decode_share, decode_shared_bytes
from ._launch import Launch
from ._sm90 import (
    aligned,
    centred,
    groups_a_tile,
    let_the_next_kernel_start,
    wait_for_the_kernel_before,
    words_layout,
    zero_lanes,
)
from ._sm90_expert_gemm import (
    ExpertGemm,
    ask_rows,
    cluster_sums,
    columns_of,
    leave_sums,
    multiplied,
    operands,
    paired,
    pairs_layout,
)
from ._sm90_moe_consumer import activated
from ._sm90_slabs import keep_loads_in_order, keep_shared_memory, of_chunk
from ._sm90_stream import beside_sums, chunk_of, put, words_of
from ._token_sums import placed_sums

MOST_CLUSTER = 8
X_ALIGNMENT = 16  # elements: asynchronous copies take 16 bytes, and Triton knows of multiples of 16


@gluon.jit
def _slots(sorted_ptr, position, lane, slots, ROUTED: gl.constexpr):
    """The slots at some positions of a block; `slots` for padding. Blocks of one are not sorted."""
    if ROUTED == 1:
        slot = gl.where(lane < 1, position, slots)
    else:
        slot = gl.load(sorted_ptr + position, mask=lane < ROUTED, other=slots, cache_modifier=".cg")
    return slot


@gluon.jit
def _codes_at(codes_ptr, block_n, width, stride, tiles_n, HALVES: gl.constexpr, WARPS: gl.constexpr):
    """The words of a program's rows, in their first tile: with HALVES, half of them are `width` rows on."""
    layout: gl.constexpr = words_layout(WARPS)
    HALF: gl.constexpr = 4 * WARPS // HALVES  # in fours of rows
    y = gl.expand_dims(gl.arange(0, 4 * WARPS, gl.SliceLayout(1, layout)), 1)
    word = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, layout)), 0)
    row = block_n * HALF + y % HALF + y // HALF * (width // 4)
    tile_row = gl.minimum(row // 16, tiles_n - 1).to(gl.int64)
    return codes_ptr + (tile_row * stride + row % 16 * 32 + word)


@gluon.jit
def _ask_rows(slabs, slab, grids, stride, here, GROUP: gl.constexpr, DEPTH: gl.constexpr, HALVES: gl.constexpr):
    """Starts copying a trip's scales, and zero points where there are any. here: as `ask_rows` takes it."""
    for i in gl.static_range(len(slabs)):
        ask_rows(slabs[i].index(slab), grids[i], stride, here, GROUP, DEPTH, HALVES)


@gluon.jit
def _multiplied_trip(
    acc, words, codes_at, left, xs, slabs, slab, GROUP: gl.constexpr, CHUNK: gl.constexpr, WARPS: gl.constexpr
):
    """acc with the products of the tiles that are here, and the words of the next trip, asked for."""
    DTYPE: gl.constexpr = xs.dtype
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    mma: gl.constexpr = acc.type.layout
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    for c in gl.static_range(len(words) // CHUNK):
        scale = of_chunk(slabs[0].index(slab), c, GROUPS, WARPS)
        if len(slabs) == 2:
            zero = zero_lanes(of_chunk(slabs[1].index(slab), c, GROUPS, WARPS), DTYPE)
        else:
            zero = zero_lanes(gl.full(scale.shape, 8, gl.int32, scale.type.layout), DTYPE)
        part = gl.zeros(acc.shape, gl.float32, mma)
        for i in gl.static_range(c * CHUNK, (c + 1) * CHUNK):
            codes = operands(centred(words[i], zero, DTYPE, WARPS), GROUPS, DTYPE, WARPS, a_layout)
            words = put(words, i, words_of(codes_at, i, left))
            x = columns_of(xs, i * 64, GROUPS, b_layout)
            acc, part = multiplied(acc, part, codes, x, scale, GROUPS, WARPS, mma)
            if i % 2 == 1:
                keep_loads_in_order()
        if GROUPS == 1:
            acc += part * beside_sums(scale, WARPS, mma)
    return acc, words


@gluon.jit
def _store(out_ptr, sums, n, m, here, width, stride, ACTIVATION: gl.constexpr):
    """out[m, n] = activation(sums[n, m]); of two sums that of the first, times the second."""
    value = activated(sums[0], ACTIVATION)
    if len(sums) == 2:
        value *= sums[1]
    at_out = out_ptr + gl.expand_dims(m.to(gl.int64) * stride, 0) + gl.expand_dims(n, 1)
    valid = gl.expand_dims(here, 0) & gl.expand_dims(n < width, 1)
    # For the next kernel, past all the weights that are read until then.
    gl.store(at_out, value.to(out_ptr.dtype.element_ty), mask=valid, eviction_policy="evict_last")


@gluon.jit(do_not_specialize=["experts", "slots"])
def _sm90_moe_decode(
    out_ptr,  # [positions, N or N/2]; SUMMED: [slots / SPLIT, N]
    x_ptr,  # [slots / TOP_K, K]; no TOP_K: [positions, K]
    codes_ptr,  # [E, N/64, K/64 * 512] int32, layout SM90
    scales_ptr,  # [E, K/G, N_PADDED]
    zeros_ptr,  # [E, K/G, N_PADDED] uint8, or None: every zero point is 8
    shares_ptr,  # [slots], or None: what multiplies a row
    sorted_ptr,  # [positions] int32: slots; padding is `slots` and more
    expert_ptr,  # [blocks]: a block's expert; none of 0 to E - 1: no work
    parts_ptr,  # [programs, 16 * WARPS, BLOCK_M] fp32, or None for clusters of one
    experts,  # E
    slots,
    width,  # N, or N/2
    K,
    out_stride,
    x_stride,
    codes_expert,
    codes_stride,
    scales_expert,
    scales_stride,
    GROUP: gl.constexpr,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    ROUTED: gl.constexpr,  # slots a block
    BLOCK_M: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,  # programs of a cluster
    SUMMED: gl.constexpr,  # over the slots of a token, one a program of the cluster; else they split K
    EARLY: gl.constexpr,  # the kernel before this one has not routed: experts are known before it ends
    SHARE: gl.constexpr,  # tiles of 64 columns, a program: whole chunks
    DEPTH: gl.constexpr,  # tiles on their way
    SLABS: gl.constexpr,  # of x, scales and zero points in shared memory; fewer than trips: a ring
    SPARE: gl.constexpr,  # KiB of shared memory that keep more programs off the SM
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * WARPS
    HALVES: gl.constexpr = 2 if GATED else 1
    HALF: gl.constexpr = ROWS // HALVES
    TRIPS: gl.constexpr = (SHARE + DEPTH - 1) // DEPTH
    AHEAD: gl.constexpr = SLABS if SLABS == TRIPS else SLABS - 1
    CHUNK: gl.constexpr = chunk_of(GROUP, DEPTH)
    LINES: gl.constexpr = DEPTH // CHUNK * groups_a_tile(GROUP)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    sums_layout: gl.constexpr = gl.SliceLayout(2, pairs_layout(HALF, WARPS)) if GATED else mma
    if not EARLY:
        wait_for_the_kernel_before()
        let_the_next_kernel_start()

    blocks_n = gl.cdiv(width, HALF)
    split = gl.program_id(0) % SPLIT
    block_n = gl.program_id(0) // SPLIT % blocks_n
    block_m = gl.program_id(0) // SPLIT // blocks_n
    if SUMMED:
        block_m = block_m * SPLIT + split
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    lane = gl.arange(0, BLOCK_M, gl.SliceLayout(1, x_layout))
    expert = gl.load(expert_ptr + block_m, cache_modifier=".cg").to(gl.int64)
    slot = _slots(sorted_ptr, block_m * ROUTED + lane, lane, slots, ROUTED)
    if SPLIT == 1:
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums_layout))
    SOON: gl.constexpr = SPLIT == 1 and BLOCK_M == 8  # of 16 they would take registers that a program more needs
    if SOON:
        out_slot = _slots(sorted_ptr, block_m * ROUTED + m, m, slots, ROUTED)
    keep_loads_in_order()  # slots are asked for beside the expert
    served = (expert >= 0) & (expert < experts)
    first = split * (0 if SUMMED else SHARE)
    left = gl.minimum(gl.cdiv(K, 64) - first, SHARE)  # tiles
    if SUMMED:
        expert = gl.where(served, expert, 0)
        left = gl.where(served, left, 0)
    elif not served:
        return

    flat: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    slabs = (gl.allocate_shared_memory(DTYPE, [SLABS, LINES, ROWS], flat),)
    grids = (scales_ptr + expert * scales_expert,)
    if zeros_ptr is not None:
        slabs = slabs + (gl.allocate_shared_memory(gl.uint8, [SLABS, LINES, ROWS], flat),)
        grids = grids + (zeros_ptr + expert * scales_expert,)
    tiles = left
    for trip in gl.static_range(AHEAD):
        here = block_n, width, first, trip * DEPTH, tiles
        _ask_rows(slabs, trip, grids, scales_stride, here, GROUP, DEPTH, HALVES)
    keep_loads_in_order()  # scales first: what is asked for last comes last
    codes_ptr += expert * codes_expert + first * 512
    codes_at = _codes_at(codes_ptr, block_n, width, codes_stride, scales_stride // 64, HALVES, WARPS)
    words = ()
    for i in gl.static_range(min(DEPTH, SHARE)):
        words = words + (words_of(codes_at, i, left),)

    x_slabs = gl.allocate_shared_memory(DTYPE, [SLABS, BLOCK_M, 64 * DEPTH], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    x_row = block_m * ROUTED + lane if TOP_K is None else slot // TOP_K
    k = gl.expand_dims(gl.arange(0, 64 * DEPTH, gl.SliceLayout(0, x_layout)), 0)
    x_at = x_ptr + gl.expand_dims(x_row.to(gl.int64) * x_stride, 1) + (first * 64 + k)
    valid = gl.expand_dims((slot < slots) & served, 1)
    columns = gl.minimum(K - first * 64, SHARE * 64)
    keep_shared_memory(SPARE)
    if EARLY:
        wait_for_the_kernel_before()
        let_the_next_kernel_start()
    for trip in gl.static_range(AHEAD):
        ahead = trip * (64 * DEPTH)
        copy_to_shared(x_slabs.index(trip), x_at + ahead, mask=valid & (k + ahead < columns))
        async_copy.commit_group()
    if SLABS == TRIPS:
        async_copy.wait_group(0)
        workgroup_barrier()

    acc = gl.zeros([ROWS, BLOCK_M], gl.float32, mma)
    for trip in range(TRIPS):
        if SLABS < TRIPS:
            async_copy.wait_group(SLABS - 2)
            workgroup_barrier()
            coming = trip + SLABS - 1
            if coming < TRIPS:
                slab, ahead = coming % SLABS, coming * (64 * DEPTH)
                copy_to_shared(x_slabs.index(slab), x_at + ahead, mask=valid & (k + ahead < columns))
                here = block_n, width, first, coming * DEPTH, tiles
                _ask_rows(slabs, slab, grids, scales_stride, here, GROUP, DEPTH, HALVES)
            async_copy.commit_group()  # of nothing at the end: the count of groups stays
        codes_at += DEPTH * 512
        left -= DEPTH
        slab = trip % SLABS
        acc, words = _multiplied_trip(acc, words, codes_at, left, x_slabs.index(slab), slabs, slab, GROUP, CHUNK, WARPS)

    if SUMMED and shares_ptr is not None:
        acc *= gl.load(shares_ptr + block_m).to(gl.float32)
    if SPLIT > 1:
        n, m = gl.arange(0, ROWS, gl.SliceLayout(1, mma)), gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
        leave_sums(parts_ptr, acc, n, m, ROUTED)
        SHARERS: gl.constexpr = 8 if SPLIT >= 8 else 4 if SPLIT >= 4 else 2
        if split >= SHARERS:
            return
        sums, n, m = cluster_sums(parts_ptr, split, ROUTED, HALF, BLOCK_M, WARPS, HALVES, SPLIT, SHARERS)
    else:
        sums = paired(acc, pairs_layout(HALF, WARPS)) if GATED else (acc,)
        n = gl.arange(0, HALF, gl.SliceLayout(1, sums_layout))
    if not SOON:
        out_slot = _slots(sorted_ptr, block_m * ROUTED + m, m, slots, ROUTED)
    if SUMMED:
        out_row, here = block_m // SPLIT + m, m < 1
    else:
        out_row, here = block_m * ROUTED + m, out_slot < slots
        if shares_ptr is not None:
            share = gl.expand_dims(gl.load(shares_ptr + out_slot, mask=here, other=0.0).to(gl.float32), 0)
            for s in gl.static_range(HALVES):
                sums = put(sums, s, sums[s] * share)
    _store(out_ptr, sums, block_n * HALF + n, out_row, here, width, out_stride, ACTIVATION)


def gemm(
    *,
    out: Tensor,
    x: Tensor,
    weight: PackedWeight,
    routing: Route,
    shares: Tensor | None,
    top_k: int | None,
    activation: str | None,
    gated: bool,
    tile: Sm90DecodeTile,
) -> Launch:
    """One GEMM of an expert layer over blocks of at most 16 slots: out [positions, N or N/2].

    top_k   slots of a row of x; None: rows of x stand in the order of positions, and an earlier kernel has routed
    shares  [slots], in fp32, multiply a row before the activation; None: nothing does
    """
    it = ExpertGemm(
        out=out,
        x=aligned(x, X_ALIGNMENT),
        weight=weight,
        experts=routing.expert_ids,
        shares=shares,
        top_k=top_k,
        activation=activation,
        gated=gated,
    )
    return _launch(it, routing.sorted_token_ids, routing.block, routing.position.numel(), tile)


def few(
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
    tile: Sm90DecodeTile,
    tile2: Sm90DecodeTile,
) -> tuple[Launch, ...]:
    """The launches of an expert layer for a few tokens, whose slots are blocks of their own: nothing is routed."""
    top_k = topk_ids.shape[1]
    ids, shares = topk_ids.contiguous(), topk_weights.contiguous()
    slots = ids.numel()
    hidden = out.new_empty((slots, w2.k))
    inputs, outputs = (shares, None) if weight_input else (None, shares)
    one = ExpertGemm(
        out=hidden,
        x=aligned(x, X_ALIGNMENT),
        weight=w13,
        experts=ids,
        shares=inputs,
        top_k=top_k,
        activation=activation,
        gated=gated,
    )
    gemm1 = _launch(one, None, 1, slots, tile)
    two: dict[str, Any] = {"x": hidden, "weight": w2, "experts": ids, "shares": outputs, "top_k": None}
    if top_k <= MOST_CLUSTER:
        return gemm1, _launch(ExpertGemm(out=out, **two), None, 1, slots, tile2, summed=top_k)
    y = out.new_empty((slots, w2.n))
    return gemm1, _launch(ExpertGemm(out=y, **two), None, 1, slots, tile2), placed_sums(out, y, ids, w2.experts)


def _launch(
    it: ExpertGemm, sorted_ids: Tensor | None, block: int, slots: int, tile: Sm90DecodeTile, summed: int = 0
) -> Launch:
    """summed: slots of a token, to be added into out [tokens, N]; 0: they are not."""
    halves, block_m = 2 if it.gated else 1, 8 if block <= 8 else 16
    warps = 4 if it.gated and it.width % (8 * tile.warps) else tile.warps  # no gate row beside up rows of another
    rows, split = 16 * warps, summed or tile.split_k
    tile = replace(tile, warps=warps, split_k=1 if summed else split)
    k, group, has_zeros = it.weight.k, it.weight.group, it.weight.zeros is not None
    share = decode_share(tile, k, group)
    trips = triton.cdiv(share, tile.depth)
    clusters = it.experts.numel() // max(summed, 1) * triton.cdiv(it.width, rows // halves)
    shape = clusters * split, rows, block_m
    parts = it.out.new_empty(shape, dtype=torch.float32) if split > 1 else None
    return it.launch(
        _sm90_moe_decode,
        (clusters,),
        cluster=split,
        args={"sorted_ptr": sorted_ids, "parts_ptr": parts, "slots": slots},
        constants={
            "ROUTED": block,
            "BLOCK_M": block_m,
            "WARPS": warps,
            "SPLIT": split,
            "SUMMED": summed > 0,
            "EARLY": it.top_k is None,
            "SHARE": share,
            "DEPTH": tile.depth,
            "SLABS": trips if trips <= tile.slabs else tile.ring,
            "SPARE": decode_spare_kib(tile, decode_shared_bytes(tile, block_m, k, group, has_zeros)),
        },
        options={"num_warps": warps} | told_registers(tile.registers),
    )
