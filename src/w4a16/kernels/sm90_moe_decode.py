"""sm90_moe_decode: experts with up to 16 rows a block on Hopper; codes go from memory straight into mma.sync.

As sm90_decode, for the rows that routing sends to one expert. One program computes 16 * WARPS rows of W, or two streams
of so many: a gate row and its up row in one thread, so that the activation needs no other. The programs of a cluster
share K, or hold the experts of one token, whose sum then needs no launch of its own.
"""

# mypy: disable-error-code="assignment, misc, var-annotated, unreachable"

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..compat import workgroup_barrier
from ..layouts import PackedWeight
from ..layouts.sm90 import TILE, TILE_WORDS
from ..moe.route import Route
from ..tuning.sm90_tiles import Sm90DecodeTile
from ._launch import Launch
from ._sm90 import (
    aligned,
    centred,
    cluster_barrier,
    groups_a_tile,
    let_the_next_kernel_start,
    operand,
    row_offsets,
    wait_for_the_kernel_before,
    words_layout,
    zero_lanes,
)
from ._sm90_moe_consumer import activated
from ._sm90_stream import ask_slab, beside_sums, chunk_of, halves, of_group, put, words_of
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
        for i in gl.static_range(DEPTH):
            words = words + (words_of(codes_at[s], i, left),)
        for c in gl.static_range(CHUNKS):
            scales = scales + (of_group(scales_at[s], c * CHUNK, first, left, GROUP, CHUNK, scales_stride),)
            if zeros_ptr is not None:
                zeros = zeros + (of_group(zeros_at[s], c * CHUNK, first, left, GROUP, CHUNK, scales_stride),)

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
                if GROUPS == 1:
                    x = slab.slice((c * CHUNK + i) * 64, 64, 1).permute((1, 0)).load(b_layout)
                else:
                    x = slab.slice((c * CHUNK + i) * 64, 32, 1).permute((1, 0)).load(b_layout)
                    far_x = slab.slice((c * CHUNK + i) * 64 + 32, 32, 1).permute((1, 0)).load(b_layout)
                for s in gl.static_range(STREAMS):
                    pairs = centred(words[s * DEPTH + c * CHUNK + i], old_zeros[s], DTYPE, WARPS)
                    if GROUPS == 1:
                        part = mma_v2(operand(pairs, None, DTYPE, WARPS, a_layout), x, parts[s])
                        parts = put(parts, s, part)
                    else:
                        near, far = halves(pairs, DTYPE, WARPS, a_layout)
                        scale, far_scale = gl.split(old_scales[s].permute([0, 1, 3, 2]))
                        part = mma_v2(near, x, parts[s])
                        far_part = mma_v2(far, far_x, parts[s])
                        acc = (
                            accs[s]
                            + part * beside_sums(scale, WARPS, mma)
                            + far_part * beside_sums(far_scale, WARPS, mma)
                        )
                        accs = put(accs, s, acc)
                    words = put(words, s * DEPTH + c * CHUNK + i, words_of(codes_at[s], c * CHUNK + i, left))
            if GROUPS == 1:
                for s in gl.static_range(STREAMS):
                    accs = put(accs, s, accs[s] + parts[s] * beside_sums(old_scales[s], WARPS, mma))

    n = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    if SUMMED and shares_ptr is not None:
        share = gl.load(shares_ptr + block_m).to(gl.float32)
        for s in gl.static_range(STREAMS):
            accs = put(accs, s, accs[s] * share)
    if SPLIT > 1:
        SIZE: gl.constexpr = ROWS * BLOCK_M
        at_part = gl.expand_dims(n, 1) * BLOCK_M + gl.expand_dims(m, 0)
        here = gl.expand_dims(m, 0) < ROUTED + gl.expand_dims(n * 0, 1)
        for s in gl.static_range(STREAMS):
            gl.store(parts_ptr + (gl.program_id(0) * STREAMS + s).to(gl.int64) * SIZE + at_part, accs[s], mask=here)
        cluster_barrier()
        SHARERS: gl.constexpr = 8 if SPLIT >= 8 else 4 if SPLIT >= 4 else 2
        if split >= SHARERS:
            return
        MINE: gl.constexpr = ROWS // SHARERS
        mine: gl.constexpr = gl.BlockedLayout([1, 1], [32 // BLOCK_M, BLOCK_M], [WARPS, 1], [1, 0])
        n = split * MINE + gl.arange(0, MINE, gl.SliceLayout(1, mine))
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mine))
        at_part = gl.expand_dims(n, 1) * BLOCK_M + gl.expand_dims(m, 0)
        here = gl.expand_dims(m, 0) < ROUTED + gl.expand_dims(n * 0, 1)
        accs = ()
        for s in gl.static_range(STREAMS):
            total = gl.zeros([MINE, BLOCK_M], gl.float32, mine)
            for i in gl.static_range(SPLIT):
                program = (gl.program_id(0) - split + i) * STREAMS + s
                at_ptr = parts_ptr + program.to(gl.int64) * SIZE + at_part
                total += gl.load(at_ptr, mask=here, other=0.0, cache_modifier=".cg")
            accs = accs + (total,)
    if SUMMED:
        out_row = block_m // SPLIT + m
        here_m = m < 1
    else:
        out_row = block_m * ROUTED + m
        slot = _slots(sorted_ptr, out_row, m, slots, ROUTED)
        here_m = slot < slots
        if shares_ptr is not None:
            share = gl.expand_dims(gl.load(shares_ptr + slot, mask=here_m, other=0.0).to(gl.float32), 0)
            for s in gl.static_range(STREAMS):
                accs = put(accs, s, accs[s] * share)
    if GATED:
        accs = (activated(accs[0], ACTIVATION) * accs[1],)
    for s in gl.static_range(1 if GATED else STREAMS):
        column = row + s * APART + n
        value = accs[s] if GATED else activated(accs[s], ACTIVATION)
        at_out = out_ptr + gl.expand_dims(out_row.to(gl.int64) * out_stride, 0) + gl.expand_dims(column, 1)
        mask = gl.expand_dims(here_m, 0) & gl.expand_dims(column < WIDTH, 1)
        gl.store(at_out, value.to(out_ptr.dtype.element_ty), mask=mask)


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
    blocks = routing.block, routing.expert_ids, routing.sorted_token_ids
    return _gemm(out, x, weight, *blocks, routing.position.numel(), shares, top_k, activation, gated, 0, tile)


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
    gemm1 = _gemm(hidden, x, w13, 1, ids, None, slots, inputs, top_k, activation, gated, 0, tile)
    if top_k <= MOST_CLUSTER:
        return gemm1, _gemm(out, hidden, w2, 1, ids, None, slots, outputs, None, None, False, top_k, tile2)
    y = out.new_empty((slots, w2.n))
    gemm2 = _gemm(y, hidden, w2, 1, ids, None, slots, outputs, None, None, False, 0, tile2)
    return gemm1, gemm2, placed_sums(out, y, ids, w2.experts)


def _gemm(
    out: Tensor,
    x: Tensor,
    weight: PackedWeight,
    block: int,
    expert_ids: Tensor,
    sorted_ids: Tensor | None,
    slots: int,
    shares: Tensor | None,
    top_k: int | None,
    activation: str | None,
    gated: bool,
    summed: int,
    tile: Sm90DecodeTile,
) -> Launch:
    """summed: slots of a token, to be added into out [tokens, N]; 0: they are not."""
    x = aligned(x, X_ALIGNMENT)
    n, k = weight.n, weight.k
    side_by_side = triton.cdiv(n // (2 if gated else 1), TILE) % (tile.warps // 4) == 0
    warps = tile.warps if side_by_side else 4
    rows, streams, block_m = 16 * warps, 2, 8 if block <= 8 else 16
    blocks_n, tiles = triton.cdiv(n, rows * streams), triton.cdiv(k, TILE)
    split = summed or tile.split_k
    trips = triton.cdiv(tiles, tile.depth * (1 if summed else split))
    clusters = expert_ids.numel() // max(summed, 1) * blocks_n
    parts = out.new_empty((clusters * split, streams, rows, block_m), dtype=torch.float32) if split > 1 else None
    args = {
        "out_ptr": out,
        "x_ptr": x,
        "codes_ptr": weight.codes,
        "scales_ptr": weight.scales,
        "zeros_ptr": weight.zeros,
        "shares_ptr": shares,
        "sorted_ptr": sorted_ids,
        "expert_ptr": expert_ids,
        "parts_ptr": parts,
        "slots": slots,
        "N": n,
        "K": k,
        "out_stride": out.stride(0),
        "x_stride": x.stride(0),
        "codes_expert": weight.codes.stride(0),
        "codes_stride": tiles * TILE_WORDS,
        "scales_expert": weight.scales.stride(0),
        "scales_stride": weight.scales.shape[-1],
    }
    constants = {
        "EXPERTS": weight.experts,
        "GROUP": tiles * TILE if weight.group == k else weight.group,
        "TOP_K": top_k,
        "ACTIVATION": activation,
        "GATED": gated,
        "ROUTED": block,
        "BLOCK_M": block_m,
        "WARPS": warps,
        "STREAMS": streams,
        "SPLIT": split,
        "SUMMED": summed > 0,
        "EARLY": top_k is None,
        "TRIPS": trips,
        "DEPTH": tile.depth,
        "SLABS": trips if trips <= tile.slabs else tile.ring,
    }
    options = {"num_warps": warps, "launch_pdl": True} | ({"maxnreg": tile.registers} if tile.registers else {})
    return Launch(fn=_sm90_moe_decode, grid=(clusters,), cluster=split, args=args, constants=constants, options=options)
