"""sm90_moe_decode: experts with up to 16 rows a block on Hopper; codes go from memory straight into mma.sync.

As sm90_decode, for the rows that routing sends to one expert. One program computes 16 * WARPS rows of W, or two streams
of so many: a gate row and its up row in one thread, so that the activation needs no other. The programs of a cluster
share K, or hold the experts of one token, whose sum then needs no launch of its own.
"""

# mypy: disable-error-code="assignment, misc, var-annotated, unreachable"

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..compat import workgroup_barrier
from ..layouts import PackedWeight
from ..layouts.sm90 import TILE
from ..moe.route import Route
from ..tuning.sm90_tiles import Sm90DecodeTile
from ._launch import Launch
from ._sm90 import (
    aligned,
    centred,
    groups_a_tile,
    let_the_next_kernel_start,
    row_offsets,
    wait_for_the_kernel_before,
    words_layout,
    zero_lanes,
)
from ._sm90_expert_gemm import ExpertGemm, cluster_sums, columns_of, leave_sums, multiplied, operands
from ._sm90_moe_consumer import activated
from ._sm90_stream import ask_slab, beside_sums, chunk_of, of_group, put, words_of
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
def _stream(
    codes_at, scales_at, zeros_at, first, left, stride, GROUP: gl.constexpr, DEPTH: gl.constexpr, CHUNK: gl.constexpr
):
    """Asks for a stream's first DEPTH tiles and for what their chunks are scaled with."""
    words, scales, zeros = (), (), ()
    for i in gl.static_range(DEPTH):
        words = words + (words_of(codes_at, i, left),)
    for c in gl.static_range(DEPTH // CHUNK):
        scales = scales + (of_group(scales_at, c * CHUNK, first, left, GROUP, CHUNK, stride),)
        if zeros_at is not None:
            zeros = zeros + (of_group(zeros_at, c * CHUNK, first, left, GROUP, CHUNK, stride),)
    return words, scales, zeros


@gluon.jit
def _scaled(accs, share):
    """Every stream's sums times `share`."""
    scaled = ()
    for s in gl.static_range(len(accs)):
        scaled = scaled + (accs[s] * share,)
    return scaled


@gluon.jit
def _store(out_ptr, accs, row, APART: gl.constexpr, n, m, here, WIDTH, stride, ACTIVATION: gl.constexpr):
    """out[m, row + n] = activation(sums), the streams APART rows apart; gated: of the first times the second."""
    for s in gl.static_range(1 if APART == 0 else len(accs)):
        value = activated(accs[s], ACTIVATION)
        if APART == 0:
            value *= accs[1]
        column = row + s * APART + n
        at_out = out_ptr + gl.expand_dims(m.to(gl.int64) * stride, 0) + gl.expand_dims(column, 1)
        mask = gl.expand_dims(here, 0) & gl.expand_dims(column < WIDTH, 1)
        gl.store(at_out, value.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["slots"])
def _sm90_moe_decode(
    out_ptr,  # [positions, N or N/2]; SUMMED: [slots / SPLIT, N]
    x_ptr,  # [slots / TOP_K, K]; no TOP_K: [positions, K]
    codes_ptr,  # [E, N/64, K/64 * 512] int32, layout SM90
    scales_ptr,  # [E, K/G, N_PADDED]
    zeros_ptr,  # [E, K/G, N_PADDED] uint8, or None: every zero point is 8
    shares_ptr,  # [slots], or None: what multiplies a row
    sorted_ptr,  # [positions] int32: slots; padding is `slots` and more
    expert_ptr,  # [blocks]: a block's expert; none of 0 to E - 1: no work
    parts_ptr,  # [programs, STREAMS, 16 * WARPS, BLOCK_M] fp32, or None for clusters of one
    slots,
    N,
    K,
    out_stride,
    x_stride,
    codes_expert,
    codes_stride,
    scales_expert,
    scales_stride,
    EXPERTS: gl.constexpr,
    GROUP: gl.constexpr,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    ROUTED: gl.constexpr,  # slots a block
    BLOCK_M: gl.constexpr,
    WARPS: gl.constexpr,
    STREAMS: gl.constexpr,  # of rows of W
    SPLIT: gl.constexpr,  # programs of a cluster
    SUMMED: gl.constexpr,  # over the slots of a token, one a program of the cluster; else they split K
    EARLY: gl.constexpr,  # the kernel before this one has not routed: experts are known before it ends
    TRIPS: gl.constexpr,  # of DEPTH tiles of 64 columns, a program
    DEPTH: gl.constexpr,  # tiles of a stream on their way
    SLABS: gl.constexpr,  # of x in shared memory; fewer than TRIPS: a ring
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * WARPS
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    CHUNK: gl.constexpr = chunk_of(GROUP, DEPTH)
    CHUNKS: gl.constexpr = DEPTH // CHUNK
    PER_TRIP: gl.constexpr = DEPTH * 64 // GROUP if GROUP == 32 or GROUP == 64 * CHUNK else 0  # groups
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    if not EARLY:
        wait_for_the_kernel_before()
        let_the_next_kernel_start()

    WIDTH = N // 2 if GATED else N
    APART: gl.constexpr = 0 if GATED else ROWS  # rows between the streams
    blocks_n = gl.cdiv(WIDTH, ROWS if GATED else ROWS * STREAMS)
    split = gl.program_id(0) % SPLIT
    block_n = gl.program_id(0) // SPLIT % blocks_n
    block_m = gl.program_id(0) // SPLIT // blocks_n
    if SUMMED:
        block_m = block_m * SPLIT + split
    expert = gl.load(expert_ptr + block_m, cache_modifier=".cg").to(gl.int64)
    served = (expert >= 0) & (expert < EXPERTS)
    first = split * (0 if SUMMED else TRIPS * DEPTH)
    left = gl.cdiv(K, 64) - first  # tiles
    if SUMMED:
        expert = gl.where(served, expert, 0)
        left = gl.where(served, left, 0)
    elif not served:
        return

    layout: gl.constexpr = words_layout(WARPS)
    y = gl.arange(0, 4 * WARPS, gl.SliceLayout(1, layout))
    word = gl.arange(0, 32, gl.SliceLayout(0, layout))
    row = block_n * (ROWS if GATED else ROWS * STREAMS)
    codes_ptr += expert * codes_expert + first * 512
    tiles_n = scales_stride // 64
    codes_at, scales_at, zeros_at, words, scales, zeros = (), (), (), (), (), ()
    for s in gl.static_range(STREAMS):
        top = row + s * (WIDTH if GATED else ROWS)
        tile_row = gl.minimum(top // 64 + y // 16, tiles_n - 1).to(gl.int64)
        tile_at = gl.expand_dims(tile_row * codes_stride + y % 16 * 32, 1) + gl.expand_dims(word, 0)
        codes_at = codes_at + (codes_ptr + tile_at,)
        offsets = gl.minimum(top, scales_stride - ROWS) + row_offsets(WARPS, GROUPS, scales_stride)
        offsets = expert * scales_expert + offsets
        if PER_TRIP > 0:
            offsets += split * (0 if SUMMED else TRIPS * PER_TRIP) * scales_stride
        scales_at = scales_at + (scales_ptr + offsets,)
        if zeros_ptr is not None:
            zeros_at = zeros_at + (zeros_ptr + offsets,)
        zeros_of_s = None if zeros_ptr is None else zeros_at[s]
        asked = _stream(codes_at[s], scales_at[s], zeros_of_s, first, left, scales_stride, GROUP, DEPTH, CHUNK)
        words, scales, zeros = words + asked[0], scales + asked[1], zeros + asked[2]

    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    xs = gl.allocate_shared_memory(DTYPE, [SLABS, BLOCK_M, 64 * DEPTH], shared)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    lane = gl.arange(0, BLOCK_M, gl.SliceLayout(1, x_layout))
    position = block_m * ROUTED + lane
    slot = _slots(sorted_ptr, position, lane, slots, ROUTED)
    valid = (slot < slots) & served
    x_row = position if TOP_K is None else slot // TOP_K
    k = gl.expand_dims(first * 64 + gl.arange(0, 64 * DEPTH, gl.SliceLayout(0, x_layout)), 0)
    x_at = x_ptr + gl.expand_dims(x_row.to(gl.int64) * x_stride, 1) + k
    valid = gl.expand_dims(valid, 1)
    if EARLY:
        wait_for_the_kernel_before()
        let_the_next_kernel_start()
    for trip in gl.static_range(SLABS if SLABS == TRIPS else SLABS - 1):
        ask_slab(xs.index(trip), x_at, valid, k, K, trip, DEPTH)
    if SLABS == TRIPS:
        async_copy.wait_group(0)
        workgroup_barrier()

    accs = ()
    for _ in gl.static_range(STREAMS):
        accs = accs + (gl.zeros([ROWS, BLOCK_M], gl.float32, mma),)
    for trip in range(TRIPS):
        if SLABS < TRIPS:
            async_copy.wait_group(SLABS - 2)
            workgroup_barrier()
            ask_slab(xs.index((trip + SLABS - 1) % SLABS), x_at, valid, k, K, trip + SLABS - 1, DEPTH)
        slab = xs.index(trip % SLABS)
        first += DEPTH
        left -= DEPTH
        for s in gl.static_range(STREAMS):
            codes_at = put(codes_at, s, codes_at[s] + DEPTH * 512)
            scales_at = put(scales_at, s, scales_at[s] + PER_TRIP * scales_stride)
            if zeros_ptr is not None:
                zeros_at = put(zeros_at, s, zeros_at[s] + PER_TRIP * scales_stride)
        for c in gl.static_range(CHUNKS):
            parts, old_scales, old_zeros = (), (), ()
            for s in gl.static_range(STREAMS):
                old_scales = old_scales + (scales[s * CHUNKS + c],)
                fresh = of_group(scales_at[s], c * CHUNK, first, left, GROUP, CHUNK, scales_stride)
                scales = put(scales, s * CHUNKS + c, fresh)
                if zeros_ptr is not None:
                    old_zeros = old_zeros + (zero_lanes(zeros[s * CHUNKS + c], DTYPE),)
                    fresh_zero = of_group(zeros_at[s], c * CHUNK, first, left, GROUP, CHUNK, scales_stride)
                    zeros = put(zeros, s * CHUNKS + c, fresh_zero)
                else:
                    eight = gl.full(old_scales[s].shape, 8, gl.int32, old_scales[s].type.layout)
                    old_zeros = old_zeros + (zero_lanes(eight, DTYPE),)
                parts = parts + (gl.zeros([ROWS, BLOCK_M], gl.float32, mma),)
            for i in gl.static_range(CHUNK):
                x = columns_of(slab, (c * CHUNK + i) * 64, GROUPS, b_layout)
                for s in gl.static_range(STREAMS):
                    pairs = centred(words[s * DEPTH + c * CHUNK + i], old_zeros[s], DTYPE, WARPS)
                    codes = operands(pairs, GROUPS, DTYPE, WARPS, a_layout)
                    acc, part = multiplied(accs[s], parts[s], codes, x, old_scales[s], GROUPS, WARPS, mma)
                    accs, parts = put(accs, s, acc), put(parts, s, part)
                    words = put(words, s * DEPTH + c * CHUNK + i, words_of(codes_at[s], c * CHUNK + i, left))
            if GROUPS == 1:
                for s in gl.static_range(STREAMS):
                    accs = put(accs, s, accs[s] + parts[s] * beside_sums(old_scales[s], WARPS, mma))

    n = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    if SUMMED and shares_ptr is not None:
        accs = _scaled(accs, gl.load(shares_ptr + block_m).to(gl.float32))
    if SPLIT > 1:
        leave_sums(parts_ptr, accs, n, m, ROUTED, BLOCK_M)
        SHARERS: gl.constexpr = 8 if SPLIT >= 8 else 4 if SPLIT >= 4 else 2
        if split >= SHARERS:
            return
        accs, n, m = cluster_sums(parts_ptr, split, ROUTED, ROWS, BLOCK_M, WARPS, STREAMS, SPLIT, SHARERS)
    if SUMMED:
        out_row = block_m // SPLIT + m
        here = m < 1
    else:
        out_row = block_m * ROUTED + m
        slot = _slots(sorted_ptr, out_row, m, slots, ROUTED)
        here = slot < slots
        if shares_ptr is not None:
            accs = _scaled(accs, gl.expand_dims(gl.load(shares_ptr + slot, mask=here, other=0.0).to(gl.float32), 0))
    _store(out_ptr, accs, row, APART, n, out_row, here, WIDTH, out_stride, ACTIVATION)


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
    warps = tile.warps if triton.cdiv(it.width, TILE) % (tile.warps // 4) == 0 else 4  # tiles side by side
    rows, streams, block_m = 16 * warps, 2, 8 if block <= 8 else 16
    split = summed or tile.split_k
    trips = triton.cdiv(it.tiles, tile.depth * (1 if summed else split))
    clusters = it.experts.numel() // max(summed, 1) * triton.cdiv(it.weight.n, rows * streams)
    shape = clusters * split, streams, rows, block_m
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
            "STREAMS": streams,
            "SPLIT": split,
            "SUMMED": summed > 0,
            "EARLY": it.top_k is None,
            "TRIPS": trips,
            "DEPTH": tile.depth,
            "SLABS": trips if trips <= tile.slabs else tile.ring,
        },
        options={"num_warps": warps} | ({"maxnreg": tile.registers} if tile.registers else {}),
    )
