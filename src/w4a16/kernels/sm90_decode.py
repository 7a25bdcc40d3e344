"""sm90_decode: up to 16 rows of x on Hopper; codes go from memory straight into operands of mma.sync.

Each warp multiplies 16 rows of W over one part of K. Parts are those of the warps of a program, added in shared memory,
and of the programs of a cluster, added in a fixed order: no counters, nothing that launches share. Codes of the next
DEPTH tiles are always on their way, in registers: no barrier stands between a warp and its next bytes.
"""

# mypy: disable-error-code="assignment, union-attr, var-annotated, unreachable"

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..compat import copy_to_shared, told_registers, workgroup_barrier
from ..layouts import PackedWeight
from ..layouts.sm90 import TILE, TILE_WORDS
from ..tuning.sm90_decode_tiles import decode_spare_kib
from ..tuning.sm90_tiles import Sm90DecodeTile, decode_share, decode_shared_bytes, group_of_tiles
from ._launch import Launch, runs
from ._sm90 import (
    aligned,
    centred,
    cluster_barrier,
    groups_a_tile,
    let_the_next_kernel_start,
    operand,
    wait_for_the_kernel_before,
    words_layout,
    zero_lanes,
)
from ._sm90_slabs import (
    ask_groups,
    beside_parts,
    keep_loads_in_order,
    keep_shared_memory,
    of_chunk,
    of_parts,
    zeros_of_chunk,
)
from ._sm90_stream import ask_l2, chunk_of, halves, put, words_of

X_ALIGNMENT = 16  # elements: asynchronous copies take 16 bytes, and Triton knows of multiples of 16
X_FARTHEST = 1 << 27  # elements from row to row: offsets in x are 32 bits, of 64 they take up to 35 registers more


@gluon.jit(do_not_specialize=["M", "share", "trips"])
def _sm90_decode(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N/64, K/64 * 512] int32, layout SM90
    scales_ptr,  # [K/G, N_PADDED]
    zeros_ptr,  # [K/G, N_PADDED] uint8, or None: every zero point is 8
    bias_ptr,  # [N] or None
    parts_ptr,  # [blocks, SPLIT, 16 * WARPS / PARTS, BLOCK_M] fp32, or None for one split
    M,
    N,
    K,
    share,  # tiles of 64 columns a part
    trips,  # of DEPTH tiles
    out_stride,
    x_stride,
    codes_stride,
    scales_stride,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WARPS: gl.constexpr,
    PARTS: gl.constexpr,  # of K, a program
    SPLIT: gl.constexpr,  # programs of a cluster
    DEPTH: gl.constexpr,  # tiles a trip has room for
    TILES: gl.constexpr,  # of them that it takes, on their way at a time: fewer where one trip is all
    SLABS: gl.constexpr,  # of x, scales and zero points in shared memory
    WHOLE: gl.constexpr,  # a slab for every trip; else they are a ring
    SPARE: gl.constexpr,  # KiB of shared memory that keep more programs off the SM
    EARLY: gl.constexpr,  # the tile that takes another's place is asked for before that one's product
    L2_AHEAD: gl.constexpr,  # tiles after those on their way are asked into the L2 cache
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * WARPS // PARTS
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    CHUNK: gl.constexpr = chunk_of(GROUP, DEPTH)
    LINES: gl.constexpr = DEPTH // CHUNK * GROUPS  # of scales, a trip
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [PARTS, WARPS // PARTS, 1], [1, 16, 8])
    let_the_next_kernel_start()
    block = gl.program_id(0) // SPLIT
    split = gl.program_id(0) % SPLIT
    tiles = (K + 63) >> 6

    left, codes_at = _parts_of_k(
        codes_ptr, block, split * PARTS, share, tiles, codes_stride, scales_stride, ROWS, WARPS
    )
    flat: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    scale_slabs = gl.allocate_shared_memory(DTYPE, [SLABS, LINES, PARTS * ROWS], flat)
    scales_ptr += block * ROWS
    zero_slabs = None
    if zeros_ptr is not None:
        zero_slabs = gl.allocate_shared_memory(gl.uint8, [SLABS, LINES, PARTS * ROWS], flat)
        zeros_ptr += block * ROWS
    rows = scales_stride - block * ROWS
    for trip in gl.static_range(SLABS):
        here = scales_stride, rows, split * PARTS, trip * DEPTH, share, tiles
        ask_groups(scale_slabs, zero_slabs, trip, scales_ptr, zeros_ptr, *here, GROUP, CHUNK, PARTS, WARPS)
    keep_loads_in_order()  # scales first: what is asked for last comes last
    words = ()
    for i in gl.static_range(TILES):
        words = words + (words_of(codes_at, i, left),)
    if L2_AHEAD:
        for i in gl.static_range(TILES):
            ask_l2(codes_at, i + DEPTH, left)

    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    x_slabs = gl.allocate_shared_memory(DTYPE, [SLABS, PARTS, BLOCK_M, 64 * DEPTH], shared)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 1, 32], [PARTS, WARPS // PARTS, 1], [2, 1, 0])
    p, m, k = _places(PARTS, BLOCK_M, 64 * DEPTH, x_layout)
    begin = (split * PARTS + p) * (share * 64)
    columns = gl.minimum(K - begin, share * 64)
    x_at = m * x_stride + begin + k
    keep_shared_memory(SPARE)
    wait_for_the_kernel_before()
    for trip in gl.static_range(SLABS):
        ahead = trip * (64 * DEPTH)
        copy_to_shared(x_slabs.index(trip), x_ptr + (x_at + ahead), mask=(m < M) & (k + ahead < columns))
        async_copy.commit_group()
    if WHOLE:
        async_copy.wait_group(0)
        workgroup_barrier()

    acc = gl.zeros([PARTS, ROWS, BLOCK_M], gl.float32, mma)
    for trip in range(SLABS if WHOLE else trips):
        if not WHOLE:
            async_copy.wait_group(SLABS - 1)
            workgroup_barrier()
        slab = trip % SLABS
        xs = x_slabs.index(slab)
        codes_at += DEPTH * 512
        left -= DEPTH
        acc, words = _multiplied_trip(
            acc, words, codes_at, left, xs, scale_slabs, zero_slabs, slab, GROUP, CHUNK, DEPTH, WARPS, EARLY, L2_AHEAD
        )
        if not WHOLE:
            workgroup_barrier()
            coming = trip + SLABS
            if coming < trips:
                ahead = coming * (64 * DEPTH)
                copy_to_shared(xs, x_ptr + (x_at + ahead), mask=(m < M) & (k + ahead < columns))
                here = scales_stride, rows, split * PARTS, coming * DEPTH, share, tiles
                ask_groups(scale_slabs, zero_slabs, slab, scales_ptr, zeros_ptr, *here, GROUP, CHUNK, PARTS, WARPS)
            async_copy.commit_group()  # of nothing at the end: the count of groups stays

    total = gl.sum(acc, 0)
    sums: gl.constexpr = total.type.layout
    n = gl.arange(0, ROWS, gl.SliceLayout(1, sums))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums))
    if SPLIT > 1:
        total, n, m = _cluster_total(parts_ptr, total, n, m, block, split, M, WARPS, SPLIT)
    _store(out_ptr, bias_ptr, total, block * ROWS + n, m, M, N, out_stride)


@gluon.jit
def _parts_of_k(codes_ptr, block, first_part, share, tiles, stride, rows, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """How many tiles each warp's part of K has, and the words of its rows in the first of them."""
    layout: gl.constexpr = words_layout(WARPS)
    y = gl.expand_dims(gl.arange(0, 4 * WARPS, gl.SliceLayout(1, layout)), 1)
    word = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, layout)), 0)
    first = (first_part + y // (ROWS // 4)) * share
    left = gl.minimum(tiles - first, share)
    row = block * (ROWS // 4) + y % (ROWS // 4)
    tile_row = gl.minimum(row >> 4, (rows >> 6) - 1).to(gl.int64)
    codes_at = codes_ptr + (tile_row * stride + first * 512 + (row & 15) * 32 + word)
    return left, codes_at


@gluon.jit
def _places(PARTS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """The part, the row and the column of each element of [PARTS, ROWS, COLUMNS]."""
    p = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    m = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    k = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    p = gl.expand_dims(gl.expand_dims(p, 1), 2)
    return p, gl.expand_dims(gl.expand_dims(m, 0), 2), gl.expand_dims(gl.expand_dims(k, 0), 1)


@gluon.jit
def _multiplied_trip(
    acc, words, codes_at, left, xs, scale_slabs, zero_slabs, slab, GROUP: gl.constexpr, CHUNK: gl.constexpr,
    DEPTH: gl.constexpr, WARPS: gl.constexpr, EARLY: gl.constexpr, L2_AHEAD: gl.constexpr,
):  # fmt: skip
    """acc with the products of the tiles that are here, and the words of the next trip, asked for."""
    DTYPE: gl.constexpr = xs.dtype
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    PARTS: gl.constexpr = acc.shape[0]
    mma: gl.constexpr = acc.type.layout
    flat_a: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8]), 2)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    for c in gl.static_range(len(words) // CHUNK):
        scale = of_chunk(scale_slabs.index(slab), c, GROUPS, WARPS)
        if zero_slabs is not None:
            zero = zeros_of_chunk(zero_slabs.index(slab), c, DTYPE, GROUPS, WARPS)
        else:
            zero = zero_lanes(gl.full(scale.shape, 8, gl.int32, scale.type.layout), DTYPE)
        part = gl.zeros(acc.shape, gl.float32, mma)
        for i in gl.static_range(c * CHUNK, (c + 1) * CHUNK):
            pairs = centred(words[i], zero, DTYPE, WARPS)
            words = put(words, i, words_of(codes_at, i, left))
            if L2_AHEAD:
                ask_l2(codes_at, i + DEPTH, left)
            if EARLY and (acc.shape[2] == 8 or i % 2 == 1):
                keep_loads_in_order()
            if GROUPS == 1:
                w = of_parts(operand(pairs, None, DTYPE, WARPS, flat_a), PARTS, a_layout)
                part = mma_v2(w, xs.slice(i * 64, 64, 2).permute((0, 2, 1)).load(b_layout), part)
            else:
                near, far = halves(pairs, DTYPE, WARPS, flat_a)
                near_scale, far_scale = gl.split(scale.permute([0, 1, 3, 2]))
                near_x = xs.slice(i * 64, 32, 2).permute((0, 2, 1)).load(b_layout)
                far_x = xs.slice(i * 64 + 32, 32, 2).permute((0, 2, 1)).load(b_layout)
                near_sum = mma_v2(of_parts(near, PARTS, a_layout), near_x, part)
                far_sum = mma_v2(of_parts(far, PARTS, a_layout), far_x, part)
                acc += near_sum * beside_parts(near_scale, WARPS, PARTS, mma)
                acc += far_sum * beside_parts(far_scale, WARPS, PARTS, mma)
            if i % 2 == 1 and not EARLY:
                keep_loads_in_order()
        if GROUPS == 1:
            acc += part * beside_parts(scale, WARPS, PARTS, mma)
    return acc, words


@gluon.jit
def _cluster_total(parts_ptr, sums, n, m, block, split, M, WARPS: gl.constexpr, SPLIT: gl.constexpr):
    """A program's share of the rows of `sums` [ROWS, BLOCK_M], added up over its cluster, and where these stand."""
    ROWS: gl.constexpr = sums.shape[0]
    BLOCK_M: gl.constexpr = sums.shape[1]
    SIZE: gl.constexpr = ROWS * BLOCK_M
    at = gl.expand_dims(n, 1) * BLOCK_M + gl.expand_dims(m, 0)
    here = gl.expand_dims(m, 0) < M + gl.expand_dims(n * 0, 1)
    gl.store(parts_ptr + gl.program_id(0) * SIZE + at, sums, mask=here)
    cluster_barrier()
    MINE: gl.constexpr = ROWS // SPLIT
    mine: gl.constexpr = gl.BlockedLayout([1, 1], [32 // BLOCK_M, BLOCK_M], [WARPS, 1], [1, 0])
    n = split * MINE + gl.arange(0, MINE, gl.SliceLayout(1, mine))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mine))
    at = parts_ptr + block * (SPLIT * SIZE) + gl.expand_dims(n, 1) * BLOCK_M + gl.expand_dims(m, 0)
    here = gl.expand_dims(m, 0) < M + gl.expand_dims(n * 0, 1)
    total = gl.zeros([MINE, BLOCK_M], gl.float32, mine)
    for i in gl.static_range(SPLIT):
        total += gl.load(at + i * SIZE, mask=here, other=0.0, cache_modifier=".cg")
    return total, n, m


@gluon.jit
def _store(out_ptr, bias_ptr, acc, n, m, M, N, out_stride):
    """out[m, n] = acc[n, m] + bias[n], in the dtype of out."""
    row, column = gl.expand_dims(n, 1), gl.expand_dims(m, 0)
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + row, mask=row < N, other=0.0).to(gl.float32)
    at = out_ptr + column.to(gl.int64) * out_stride + row
    gl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(column < M) & (row < N))


def plan(
    *, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: Sm90DecodeTile
) -> tuple[Launch, ...]:
    """The launch of out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    m, n, k = x.shape[0], weight.n, weight.k
    x = x.contiguous() if x.stride(0) >= X_FARTHEST else aligned(x, X_ALIGNMENT)
    rows, block_m = tile.rows, 8 if m <= 8 else 16
    blocks, tiles = triton.cdiv(n, rows), triton.cdiv(k, TILE)
    split, share = tile.split_k, decode_share(tile, k, weight.group)
    trips = triton.cdiv(share, tile.depth)
    parts = out.new_empty((blocks, split, rows, block_m), dtype=torch.float32) if split > 1 else None
    args = {
        "out_ptr": out,
        "x_ptr": x,
        "codes_ptr": weight.codes,
        "scales_ptr": weight.scales,
        "zeros_ptr": weight.zeros,
        "bias_ptr": bias,
        "parts_ptr": parts,
        "M": m,
        "N": n,
        "K": k,
        "share": share,
        "trips": trips,
        "out_stride": out.stride(0),
        "x_stride": x.stride(0),
        "codes_stride": tiles * TILE_WORDS,
        "scales_stride": weight.scales.shape[-1],
    }
    constants = {
        "GROUP": group_of_tiles(weight.group, k),
        "BLOCK_M": block_m,
        "WARPS": tile.warps,
        "PARTS": tile.parts,
        "SPLIT": split,
        "DEPTH": tile.depth,
        "TILES": min(share, tile.depth),
        "SLABS": trips if trips <= tile.slabs else tile.ring,
        "WHOLE": trips <= tile.slabs,
        "SPARE": decode_spare_kib(tile, decode_shared_bytes(tile, m, k, weight.group, weight.zeros is not None)),
        "EARLY": tile.early,
        "L2_AHEAD": tile.l2_ahead and trips > tile.slabs,
    }
    options = {"num_warps": tile.warps, "launch_pdl": True} | told_registers(tile.registers)
    return (Launch(fn=_sm90_decode, grid=(blocks,), cluster=split, args=args, constants=constants, options=options),)


sm90_decode = runs(plan)
