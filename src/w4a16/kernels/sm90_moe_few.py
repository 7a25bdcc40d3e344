"""sm90_moe_few: an expert layer for a few tokens on Hopper, every slot (a token's expert) in programs of its own.

A program computes 16 rows of the output, or 16 gate and 16 up rows, and each of its warps a part: of K (gemm1), or one
of the token's experts (gemm2). All of its codes are asked for at its start, into registers. No clusters: the hardware
crowds them, five programs on one SM while others have none. Column w of the matrix instruction is the x of warp w's
part; what other columns hold of its rows is dropped. gemm2 starts where gemm1's programs end: memory is busy meanwhile.
"""

# mypy: disable-error-code="assignment, misc, var-annotated, unreachable"

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..compat import copy_to_shared, told_registers, workgroup_barrier
from ..layouts import PackedWeight
from ._launch import Launch
from ._sm90 import (
    centred,
    groups_a_tile,
    let_the_next_kernel_start,
    row_offsets,
    rows_layout,
    wait_for_the_kernel_before,
    words_layout,
    zero_lanes,
)
from ._sm90_expert_gemm import ExpertGemm, columns_of, multiplied, operands
from ._sm90_moe_consumer import activated
from ._sm90_slabs import keep_loads_in_order
from ._sm90_stream import beside_sums, put
from ._token_sums import placed_sums

MOST_PARTS = 8  # columns of the matrix instruction
COLUMNS = gl.constexpr(MOST_PARTS)


@gluon.constexpr_function
def _chunk(group, tiles):
    """Tiles in a row that share their scales, wherever a part begins."""
    return math.gcd(max(group // 64, 1), tiles)


@gluon.jit
def _warps_of_rows(WARPS: gl.constexpr, GROUPS: gl.constexpr):
    """The warp of each of `row_offsets`."""
    layout: gl.constexpr = rows_layout(WARPS, GROUPS)
    w = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(w, 1), 2), 3)


@gluon.jit
def _expert_of(expert_ptr, slot, part, SUMMED: gl.constexpr, TOP_K: gl.constexpr):
    """The expert of each part; -1 past the slots of a token."""
    if SUMMED:
        expert = gl.load(expert_ptr + slot * TOP_K + part, mask=part < TOP_K, other=-1)
    else:
        expert = gl.load(expert_ptr + slot)
    return expert.to(gl.int64)


@gluon.jit
def _ask_x(xs, x_at, here, k, K):
    """Starts copying the columns of x from k on, slab by slab."""
    for i in gl.static_range(len(xs)):
        ahead = i * xs[i].shape[1]
        copy_to_shared(xs[i], x_at + ahead, mask=here & (k + ahead < K))
    async_copy.commit_group()


@gluon.jit
def _products(
    words, scales, zeros, xs, GROUPS: gl.constexpr, CHUNK: gl.constexpr, WARPS: gl.constexpr, STREAMS: gl.constexpr
):
    """Of each stream's rows, and of all columns, of which a warp's own counts.

    words  of each tile, stream by stream; scales and zeros of each chunk, likewise
    xs     in shared memory, slabs of a row for each column
    """
    DTYPE: gl.constexpr = xs[0].dtype
    SLAB: gl.constexpr = xs[0].shape[1] // 64  # tiles
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    eights = gl.full([WARPS, 8, GROUPS, 2], 8, gl.int32, rows_layout(WARPS, GROUPS))
    accs = ()
    for _ in gl.static_range(STREAMS):
        accs = accs + (gl.zeros([16 * WARPS, COLUMNS], gl.float32, mma),)
    for c in gl.static_range(len(words) // STREAMS // CHUNK):
        parts = ()
        for _ in gl.static_range(STREAMS):
            parts = parts + (gl.zeros([16 * WARPS, COLUMNS], gl.float32, mma),)
        for i in gl.static_range(c * CHUNK, (c + 1) * CHUNK):
            x = columns_of(xs[i // SLAB], i % SLAB * 64, GROUPS, b_layout)
            for s in gl.static_range(STREAMS):
                zero = zero_lanes(zeros[c * STREAMS + s] if len(zeros) else eights, DTYPE)
                pairs = centred(words[i * STREAMS + s], zero, DTYPE, WARPS)
                codes = operands(pairs, GROUPS, DTYPE, WARPS, a_layout)
                acc, part = multiplied(accs[s], parts[s], codes, x, scales[c * STREAMS + s], GROUPS, WARPS, mma)
                accs, parts = put(accs, s, acc), put(parts, s, part)
        if GROUPS == 1:
            for s in gl.static_range(STREAMS):
                accs = put(accs, s, accs[s] + parts[s] * beside_sums(scales[c * STREAMS + s], WARPS, mma))
    return accs


@gluon.jit
def _own_column(acc, WARPS: gl.constexpr):
    """[16 * WARPS]: of each row of sums, the column that is its warp's."""
    mma: gl.constexpr = acc.type.layout
    warp = gl.expand_dims(gl.arange(0, 16 * WARPS, gl.SliceLayout(1, mma)) // 16, 1)
    mine = warp == gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, mma)), 0)
    return gl.sum(gl.where(mine, acc, 0.0), 1)


@gluon.jit
def _sm90_moe_few(
    out_ptr,  # [slots, N or N/2]; SUMMED: [tokens, N]
    x_ptr,  # [slots / TOP_K, K]; EARLY: [slots, K]
    codes_ptr,  # [E, N/64, K/64 * 512] int32, layout SM90
    scales_ptr,  # [E, K/G, N_PADDED]
    zeros_ptr,  # [E, K/G, N_PADDED] uint8, or None: every zero point is 8
    shares_ptr,  # [slots], or None: what multiplies a row
    expert_ptr,  # [slots]: none of 0 to E - 1: no work
    N,
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
    EXPERTS: gl.constexpr,
    SUMMED: gl.constexpr,  # parts are a token's slots; else they are of K
    EARLY: gl.constexpr,  # the kernel before this one writes x and not experts: codes are asked for before it ends
    WARPS: gl.constexpr,
    TILES: gl.constexpr,  # of 64 columns, a part
    EVEN: gl.constexpr,  # every part has so many
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    STREAMS: gl.constexpr = 2 if GATED else 1
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    CHUNK: gl.constexpr = _chunk(GROUP, TILES)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    if not EARLY:
        wait_for_the_kernel_before()
        let_the_next_kernel_start()

    WIDTH = N // 2 if GATED else N
    block_n = gl.program_id(0)
    slot = gl.program_id(1)  # SUMMED: token
    tiles = gl.cdiv(K, 64)
    layout: gl.constexpr = words_layout(WARPS)
    y = gl.expand_dims(gl.arange(0, 4 * WARPS, gl.SliceLayout(1, layout)), 1)
    word = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, layout)), 0)
    w = _warps_of_rows(WARPS, GROUPS)
    first = 0 if SUMMED else (y // 4) * TILES
    first_row = 0 if SUMMED else w * TILES
    expert = _expert_of(expert_ptr, slot, y // 4, SUMMED, TOP_K)
    expert_row = _expert_of(expert_ptr, slot, w, SUMMED, TOP_K)

    # Rows of shared memory are columns of the product: the x of every part.
    SLAB: gl.constexpr = _chunk(512, TILES)  # tiles
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    across: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    rooms = ()
    for _ in gl.static_range(STREAMS):
        rooms = rooms + (gl.allocate_shared_memory(gl.float32, [WARPS, 16], across),)
    xs = ()
    for _ in gl.static_range(TILES // SLAB):
        xs = xs + (gl.allocate_shared_memory(DTYPE, [COLUMNS, 64 * SLAB], shared),)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    part = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(1, x_layout)), 1)
    k = gl.expand_dims(gl.arange(0, 64 * SLAB, gl.SliceLayout(0, x_layout)), 0)
    if SUMMED:
        expert_x = _expert_of(expert_ptr, slot, part, SUMMED, TOP_K)
        has_x = (expert_x >= 0) & (expert_x < EXPERTS)
        x_at = x_ptr + (slot * TOP_K + part).to(gl.int64) * x_stride + k
    else:
        has_x = part < WARPS
        k += part * (TILES * 64)
        x_at = x_ptr + (slot if EARLY else slot // TOP_K).to(gl.int64) * x_stride + k
    if not EARLY:
        _ask_x(xs, x_at, has_x, k, K)

    # No branch where there is no work: addresses are computed while ids come.
    served = (expert >= 0) & (expert < EXPERTS)
    served_row = (expert_row >= 0) & (expert_row < EXPERTS)
    expert = gl.where(served, expert, 0)
    expert_row = gl.where(served_row, expert_row, 0)

    codes_at = (y // 4 * 0 + block_n // 4).to(gl.int64) * codes_stride + expert * codes_expert
    codes_at = codes_ptr + (codes_at + first * 512 + block_n % 4 * 128 + y % 4 * 32) + word
    rows_at = expert_row * scales_expert + block_n * 16 + row_offsets(WARPS, GROUPS, scales_stride) - w * 16
    words, scales, zeros = (), (), ()
    for c in gl.static_range(TILES // CHUNK):
        here = served_row & (first_row + c * CHUNK < tiles)
        group = (first_row + c * CHUNK) * 64 // GROUP
        for s in gl.static_range(STREAMS):
            at = rows_at + group * scales_stride + s * WIDTH
            scales = scales + (gl.load(scales_ptr + at, mask=here, other=0.0),)
            if zeros_ptr is not None:
                zeros = zeros + (gl.load(zeros_ptr + at, mask=here, other=0),)
        for i in gl.static_range(CHUNK):
            for s in gl.static_range(STREAMS):
                at_ptr = codes_at + (c * CHUNK + i) * 512 + s * (WIDTH // 64).to(gl.int64) * codes_stride
                mask = served & (first + c * CHUNK + i < tiles)
                if EVEN and not SUMMED:
                    words = words + (gl.load(at_ptr, eviction_policy="evict_first"),)
                else:
                    words = words + (gl.load(at_ptr, mask=mask, eviction_policy="evict_first"),)

    if not EARLY:
        keep_loads_in_order()  # ptxas waits for x before it asks for codes else
    row = gl.arange(0, 16 * WARPS, gl.SliceLayout(1, mma))
    if SUMMED and shares_ptr is not None:
        share = gl.load(shares_ptr + slot * TOP_K + row // 16, mask=row // 16 < TOP_K, other=0.0).to(gl.float32)
    if EARLY:
        wait_for_the_kernel_before()
        let_the_next_kernel_start()
        _ask_x(xs, x_at, has_x, k, K)
    async_copy.wait_group(0)
    workgroup_barrier()

    accs = _products(words, scales, zeros, xs, GROUPS, CHUNK, WARPS, STREAMS)
    sums = ()
    for s in gl.static_range(STREAMS):
        total = _own_column(accs[s], WARPS)
        if SUMMED and shares_ptr is not None:
            total *= share
        rooms[s].store(total.reshape([WARPS, 16]))
    of_warps: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    for s in gl.static_range(STREAMS):
        total = gl.sum(rooms[s].load(of_warps), 0)
        if shares_ptr is not None and not SUMMED:
            total *= gl.load(shares_ptr + slot).to(gl.float32)
        sums = sums + (total,)
    value = activated(sums[0], ACTIVATION)
    if GATED:
        value *= sums[1]
    n = block_n * 16 + gl.arange(0, 16, value.type.layout)
    here = n < WIDTH
    if not SUMMED:
        here &= served
    gl.store(out_ptr + slot.to(gl.int64) * out_stride + n, value.to(out_ptr.dtype.element_ty), mask=here)


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
    parts: int,
    registers: int = 0,
) -> tuple[Launch, ...]:
    """The launches of an expert layer for a few tokens.

    parts      of K in gemm1: warps of a program, 4 or 8
    registers  of a thread of gemm2 that sums a token's slots: where its programs find room beside gemm1's;
               0: as ptxas likes
    """
    top_k = topk_ids.shape[1]
    ids, shares = topk_ids.contiguous(), topk_weights.contiguous()
    hidden = out.new_empty((ids.numel(), w2.k))
    inputs, outputs = (shares, None) if weight_input else (None, shares)
    layer: dict[str, Any] = {"experts": ids, "top_k": top_k}
    one = ExpertGemm(out=hidden, x=x, weight=w13, shares=inputs, activation=activation, gated=gated, **layer)
    layer |= {"x": hidden, "weight": w2, "shares": outputs}
    if top_k <= MOST_PARTS:
        two, warps, sums = ExpertGemm(out=out, **layer), 4 if top_k <= 4 else 8, ()
    else:
        y = out.new_empty((ids.numel(), w2.n))
        two, warps, sums = ExpertGemm(out=y, **layer), 4, (placed_sums(out, y, ids, w2.experts),)
    gemm1 = _launch(one, ids.numel(), parts)
    summed = not sums
    gemm2 = _launch(two, two.out.shape[0], warps, early=True, summed=summed, registers=registers if summed else 0)
    return gemm1, gemm2, *sums


def _launch(
    it: ExpertGemm, rows: int, warps: int, *, early: bool = False, summed: bool = False, registers: int = 0
) -> Launch:
    """rows: of out. early: x is of the launch before, which does not write experts. summed: over the slots of a token,
    into out [tokens, N]."""
    mine = it.tiles if summed else triton.cdiv(it.tiles, warps)
    grid = triton.cdiv(it.width, 16), rows
    constants = {
        "EXPERTS": it.weight.experts,
        "SUMMED": summed,
        "EARLY": early,
        "WARPS": warps,
        "TILES": mine,
        "EVEN": summed or mine * warps == it.tiles,
    }
    options = {"num_warps": warps} | told_registers(registers)
    return it.launch(_sm90_moe_few, grid, args={}, constants=constants, options=options)
