"""sm90_decode: up to 16 rows of x on Hopper; codes go from memory straight into operands of mma.sync.

One program computes 16 * WARPS rows of W over a part of K; the programs of one block of rows are a cluster, and add
their parts in a fixed order: no counters, nothing that launches share. Codes of the next DEPTH tiles are always on
their way, in registers: no barrier stands between a warp and its next bytes.
"""

# mypy: disable-error-code="assignment, var-annotated, unreachable"

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
from ..tuning.sm90_tiles import Sm90DecodeTile
from ._launch import Launch, runs
from ._sm90 import (
    aligned,
    centred,
    cluster_barrier,
    groups_a_tile,
    let_the_next_kernel_start,
    operand,
    row_offsets,
    scale_lanes,
    wait_for_the_kernel_before,
    words_layout,
    zero_lanes,
)
from ._sm90_stream import ask_slab, beside_sums, chunk_of, of_group, put, words_of

X_ALIGNMENT = 16  # elements: asynchronous copies take 16 bytes, and Triton knows of multiples of 16


@gluon.jit(do_not_specialize=["M"])
def _sm90_decode(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N/64, K/64 * 512] int32, layout SM90
    scales_ptr,  # [K/G, N_PADDED]
    zeros_ptr,  # [K/G, N_PADDED] uint8, or None: every zero point is 8
    bias_ptr,  # [N] or None
    parts_ptr,  # [blocks, SPLIT, 16 * WARPS, BLOCK_M] fp32, or None for one split
    M,
    N,
    K,
    out_stride,
    x_stride,
    codes_stride,
    scales_stride,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
    TRIPS: gl.constexpr,  # of DEPTH tiles of 64 columns, a program
    DEPTH: gl.constexpr,  # tiles on their way
    SLABS: gl.constexpr,  # of x in shared memory; fewer than TRIPS: a ring
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * WARPS
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    CHUNK: gl.constexpr = chunk_of(GROUP, DEPTH)
    PER_TRIP: gl.constexpr = DEPTH * 64 // GROUP if GROUP == 32 or GROUP == 64 * CHUNK else 0  # groups
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    let_the_next_kernel_start()
    block = gl.program_id(0) // SPLIT
    split = gl.program_id(0) % SPLIT
    first = split * (TRIPS * DEPTH)
    left = gl.cdiv(K, 64) - first  # tiles

    layout: gl.constexpr = words_layout(WARPS)
    y = gl.arange(0, 4 * WARPS, gl.SliceLayout(1, layout))
    word = gl.arange(0, 32, gl.SliceLayout(0, layout))
    tile_row = (block * (WARPS // 4) + y // 16).to(gl.int64)
    tile_at = gl.expand_dims(tile_row * codes_stride + y % 16 * 32, 1) + gl.expand_dims(word, 0)
    codes_at = codes_ptr + first * 512 + tile_at
    offsets = block * ROWS + row_offsets(WARPS, GROUPS, scales_stride)
    if PER_TRIP > 0:
        offsets += split * (TRIPS * PER_TRIP) * scales_stride
    scales_at = scales_ptr + offsets
    if zeros_ptr is not None:
        zeros_at = zeros_ptr + offsets
    words, scales, zeros = (), (), ()
    for i in gl.static_range(DEPTH):
        words = words + (words_of(codes_at, i, left),)
    for c in gl.static_range(DEPTH // CHUNK):
        scales = scales + (of_group(scales_at, c * CHUNK, first, left, GROUP, CHUNK, scales_stride),)
        if zeros_ptr is not None:
            zeros = zeros + (of_group(zeros_at, c * CHUNK, first, left, GROUP, CHUNK, scales_stride),)

    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    xs = gl.allocate_shared_memory(DTYPE, [SLABS, BLOCK_M, 64 * DEPTH], shared)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(1, x_layout)), 1)
    k = gl.expand_dims(first * 64 + gl.arange(0, 64 * DEPTH, gl.SliceLayout(0, x_layout)), 0)
    x_at = x_ptr + m.to(gl.int64) * x_stride + k
    wait_for_the_kernel_before()
    for trip in gl.static_range(SLABS if SLABS == TRIPS else SLABS - 1):
        ask_slab(xs.index(trip), x_at, m < M, k, K, trip, DEPTH)
    if SLABS == TRIPS:
        async_copy.wait_group(0)
        workgroup_barrier()

    acc = gl.zeros([ROWS, BLOCK_M], gl.float32, mma)
    for trip in range(TRIPS):
        if SLABS < TRIPS:
            async_copy.wait_group(SLABS - 2)
            workgroup_barrier()
            if trip + SLABS - 1 < TRIPS:
                ask_slab(xs.index((trip + SLABS - 1) % SLABS), x_at, m < M, k, K, trip + SLABS - 1, DEPTH)
            else:
                async_copy.commit_group()  # of nothing: the count of groups stays
        slab = xs.index(trip % SLABS)
        codes_at += DEPTH * 512
        scales_at += PER_TRIP * scales_stride
        if zeros_ptr is not None:
            zeros_at += PER_TRIP * scales_stride
        first += DEPTH
        left -= DEPTH
        for c in gl.static_range(DEPTH // CHUNK):
            scale = scales[c]
            fresh = of_group(scales_at, c * CHUNK, first, left, GROUP, CHUNK, scales_stride)
            scales = put(scales, c, fresh)
            if zeros_ptr is not None:
                zero = zero_lanes(zeros[c], DTYPE)
                fresh_zero = of_group(zeros_at, c * CHUNK, first, left, GROUP, CHUNK, scales_stride)
                zeros = put(zeros, c, fresh_zero)
            else:
                zero = zero_lanes(gl.full(scale.shape, 8, gl.int32, scale.type.layout), DTYPE)
            part = gl.zeros([ROWS, BLOCK_M], gl.float32, mma)
            for i in gl.static_range(CHUNK):
                x = slab.slice((c * CHUNK + i) * 64, 64, 1).permute((1, 0)).load(b_layout)
                pairs = centred(words[c * CHUNK + i], zero, DTYPE, WARPS)
                if GROUPS == 1:
                    part = mma_v2(operand(pairs, None, DTYPE, WARPS, a_layout), x, part)
                else:
                    acc = mma_v2(operand(pairs, scale_lanes(scale), DTYPE, WARPS, a_layout), x, acc)
                words = put(words, c * CHUNK + i, words_of(codes_at, c * CHUNK + i, left))
            if GROUPS == 1:
                acc += part * beside_sums(scale, WARPS, mma)

    n = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    if SPLIT == 1:
        _store(out_ptr, bias_ptr, acc, block * ROWS + n, m, M, N, out_stride)
    else:
        SIZE: gl.constexpr = ROWS * BLOCK_M
        at = gl.expand_dims(n, 1) * BLOCK_M + gl.expand_dims(m, 0)
        here = gl.expand_dims(m, 0) < M + gl.expand_dims(n * 0, 1)
        gl.store(parts_ptr + gl.program_id(0) * SIZE + at, acc, mask=here)
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
        _store(out_ptr, bias_ptr, total, block * ROWS + n, m, M, N, out_stride)


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
    x = aligned(x, X_ALIGNMENT)
    rows, block_m = 16 * tile.warps, 8 if m <= 8 else 16
    blocks, tiles = triton.cdiv(n, rows), triton.cdiv(k, TILE)
    split = tile.split_k
    trips = triton.cdiv(tiles, split * tile.depth)
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
        "out_stride": out.stride(0),
        "x_stride": x.stride(0),
        "codes_stride": tiles * TILE_WORDS,
        "scales_stride": weight.scales.shape[-1],
    }
    constants = {
        "GROUP": tiles * TILE if weight.group == k else weight.group,
        "BLOCK_M": block_m,
        "WARPS": tile.warps,
        "SPLIT": split,
        "TRIPS": trips,
        "DEPTH": tile.depth,
        "SLABS": trips if trips <= tile.slabs else tile.ring,
    }
    options = {"num_warps": tile.warps, "launch_pdl": True} | ({"maxnreg": tile.registers} if tile.registers else {})
    return (Launch(fn=_sm90_decode, grid=(blocks,), cluster=split, args=args, constants=constants, options=options),)


sm90_decode = runs(plan)
