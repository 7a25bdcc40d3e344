"""sm90_prefill: x @ W^T on Hopper's warpgroup matrix units, W dequantised in registers on its way to them.

Computes out^T = W @ x^T: wgmma takes its first operand, W, from registers, so that dequantised weights never pass
through shared memory. One warp copies tiles of x and of codes by TMA into a ring; WARPGROUPS warpgroups of 64 rows of W
each dequantise their next tile while wgmma works on the one before. Where there are fewer tiles than SMs, K is split;
`_add_parts` adds the parts in a fixed order. Source of the design: warp-specialised persistent GEMMs as in CUTLASS.
"""

# mypy: disable-error-code="assignment, misc, var-annotated, unreachable"

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..compat import from_shared, to_shared
from ..device import current_device, known_device
from ..layouts import PackedWeight
from ..layouts.sm90 import TILE, TILE_WORDS
from ..tuning.sm90_tiles import Sm90PrefillTile
from ._add_parts import RASTER_M, addition
from ._launch import Launch, runs
from ._sm90 import (
    aligned,
    centred,
    groups_a_tile,
    let_the_next_kernel_start,
    of_rows,
    operand,
    scale_lanes,
    sums_layout,
    wait_for_the_kernel_before,
    words_layout,
    zero_lanes,
)

BOX_BYTES = 128  # TMA writes to multiples of this in shared memory: zero points of two tiles are read for one
ALIGNMENT = 8  # elements: TMA takes addresses and strides of 16 bytes


@gluon.jit
def _unit(
    unit, M, N, K, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr
):  # fmt: skip
    """Block of M, block of N, first and last tile along K of a unit of work: whole blocks, the last past K's end."""
    tile, split = unit // SPLIT, unit % SPLIT
    blocks_m, blocks_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, 64 * WARPGROUPS)
    band = tile // (RASTER_M * blocks_n)
    tall = min(blocks_m - band * RASTER_M, RASTER_M)
    inside = tile % (RASTER_M * blocks_n)
    blocks_k = gl.cdiv(K, BLOCK_K)
    share = gl.cdiv(blocks_k, SPLIT)
    first, last = split * share, min((split + 1) * share, blocks_k)
    return band * RASTER_M + inside % tall, inside // tall, first * (BLOCK_K // 64), last * (BLOCK_K // 64)


@gluon.jit
def _units(M, N, BLOCK_M: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr):
    return gl.cdiv(M, BLOCK_M) * gl.cdiv(N, 64 * WARPGROUPS) * SPLIT


@gluon.jit
def _ask_weight(
    codes_desc, scales_desc, zeros_desc, codes, scales, zeros, full, slot, block_n, step, steps,
    GROUP: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    for w in gl.static_range(WARPGROUPS):
        row = block_n * WARPGROUPS + w
        at = slot * WARPGROUPS + w
        to_shared(codes_desc, [(row * steps + step) * 16, 0], full.index(slot), codes.index(at))
        to_shared(scales_desc, [step * 64 // GROUP, row * 64], full.index(slot), scales.index(at))
        if zeros_desc is not None:
            to_shared(zeros_desc, [step * 64 // GROUP, row * 64], full.index(slot), zeros.index(at))


@gluon.constexpr_function
def main_rows(block_m):
    """Rows of x in the first of a block's products; the others, where block_m is no power of two, are in a second."""
    return 1 << (int(block_m).bit_length() - 1)


@gluon.constexpr_function
def box_rows(block_m):
    """Rows of the boxes that copy the rest of a block of x: rows past M cost TMA more than rows of x."""
    return max(main_rows(block_m) // 4, 8)


@gluon.jit
def _expect(full, slot, rows, WEIGHT: gl.constexpr, BLOCK_M: gl.constexpr):
    """A tile of weights and one of x, of which so many rows are left."""
    BOX: gl.constexpr = box_rows(BLOCK_M)
    boxes = min(gl.cdiv(rows, BOX), BLOCK_M // BOX)
    for i in gl.static_range(1, BLOCK_M // BOX + 1):  # the count of bytes is a constant
        mbarrier.expect(full.index(slot), WEIGHT + i * BOX * 128, boxes == i)


@gluon.jit
def _ask_x(x_desc, box_desc, full, xs, slot, m, step, rows, BLOCK_M: gl.constexpr):
    """A tile of x, of which so many rows are left. Past them the tile keeps what it held, for columns not stored."""
    BOX: gl.constexpr = box_rows(BLOCK_M)
    MAIN: gl.constexpr = main_rows(BLOCK_M)
    first, rest = xs
    if rows >= MAIN:
        to_shared(x_desc, [m * BLOCK_M, step * 64], full.index(slot), first.index(slot))
    else:
        for i in gl.static_range(MAIN // BOX):
            if i * BOX < rows:
                box = first.index(slot).slice(i * BOX, BOX, 0)
                to_shared(box_desc, [m * BLOCK_M + i * BOX, step * 64], full.index(slot), box)
    for i in gl.static_range((BLOCK_M - MAIN) // BOX):
        if MAIN + i * BOX < rows:
            box = rest.index(slot).slice(i * BOX, BOX, 0)
            to_shared(box_desc, [m * BLOCK_M + MAIN + i * BOX, step * 64], full.index(slot), box)


@gluon.jit
def _producer(
    x_desc, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    xs, codes, scales, full, empty, _ = ring
    M, N, K = sizes
    ROWS: gl.constexpr = 128 if zeros_desc is None else 256  # bytes of scales, and of zero points
    WEIGHT: gl.constexpr = WARPGROUPS * (2048 + groups_a_tile(GROUP) * ROWS)  # bytes a tile
    steps = gl.cdiv(K, 64)
    # The weight does not depend on the kernel before: its first tiles are asked for while that still runs.
    m, n, first, last = _unit(gl.program_id(0), M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
    early = min(STAGES, last - first)
    rows = M - m * BLOCK_M
    for i in range(early):
        _expect(full, i, rows, WEIGHT, BLOCK_M)
        _ask_weight(
            codes_desc, scales_desc, zeros_desc, codes, scales, zeros, full, i, n, first + i, steps, GROUP, WARPGROUPS
        )
    wait_for_the_kernel_before()
    for i in range(early):
        _ask_x(x_desc, box_desc, full, xs, i, m, first + i, rows, BLOCK_M)
    done = early
    for unit in range(gl.program_id(0), _units(M, N, BLOCK_M, WARPGROUPS, SPLIT), gl.num_programs(0)):
        m, n, first, last = _unit(unit, M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
        rows = M - m * BLOCK_M
        for step in range(first + early * (unit == gl.program_id(0)).to(gl.int32), last):
            slot = done % STAGES
            mbarrier.wait(empty.index(slot), (done // STAGES & 1) ^ 1)
            _expect(full, slot, rows, WEIGHT, BLOCK_M)
            _ask_weight(
                codes_desc, scales_desc, zeros_desc, codes, scales, zeros, full, slot, n, step, steps, GROUP, WARPGROUPS
            )
            _ask_x(x_desc, box_desc, full, xs, slot, m, step, rows, BLOCK_M)
            done += 1


@gluon.jit
def _centred(codes, scales, zeros, full, done, W: gl.constexpr, TILES: gl.constexpr, DTYPE: gl.constexpr,
    GROUPS: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Codes less zero points, and scales, of the next TILES tiles of the ring."""
    pairs, lanes = (), ()
    for i in gl.static_range(TILES):
        slot = (done + i) % STAGES
        mbarrier.wait(full.index(slot), (done + i) // STAGES & 1)
        scale = of_rows(scales.index(slot * WARPGROUPS + W), GROUPS)
        if zeros is None:
            zero = gl.full(scale.shape, 8, gl.int32, scale.type.layout)
        else:
            zero = of_rows(zeros.index(slot * WARPGROUPS + W).slice(0, 64, 1), GROUPS)
        words = codes.index(slot * WARPGROUPS + W).load(words_layout(4))
        pairs = pairs + (centred(words, zero_lanes(zero, DTYPE), DTYPE, 4),)
        lanes = lanes + (scale_lanes(scale),)
    return pairs, lanes


@gluon.jit
def _operands(pairs, lanes, TILES: gl.constexpr, DTYPE: gl.constexpr, layout: gl.constexpr):
    a = ()
    for i in gl.static_range(TILES):
        a = a + (operand(pairs[i], lanes[i], DTYPE, 4, layout),)
    return a


@gluon.jit
def _started(a, x, acc):
    """acc + a @ x^T, on its way."""
    layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout(x.shape[0]), 2)
    return warpgroup_mma(gl.convert_layout(a, layout, assert_trivial=True), x.permute((1, 0)), acc, is_async=True)


@gluon.jit
def _product(a, xs, sums, done, turns, W: gl.constexpr, TILES: gl.constexpr, WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr, IN_TURN: gl.constexpr,
):  # fmt: skip
    """Starts sums + a @ x^T over the next TILES tiles of x in the ring; in turn: once the warpgroup before has.

    Free of that, two warpgroups share the matrix units, end together, and then both dequantise while those wait.
    """
    if IN_TURN:
        mbarrier.wait(turns.index(W), (done // TILES & 1) ^ (1 if W == 0 else 0))
    for i in gl.static_range(TILES):
        slot = (done + i) % STAGES
        for j in gl.static_range(len(sums)):
            sums = sums[:j] + (_started(a[i], xs[j].index(slot), sums[j]),) + sums[j + 1 :]
    if IN_TURN:
        mbarrier.arrive(turns.index((W + 1) % WARPGROUPS), count=1)
    return sums


@gluon.jit
def _ended(sums):
    """The sums once all products are there."""
    if len(sums) == 1:
        sums = (warpgroup_mma_wait(0, deps=[sums[0]]),)
    else:
        sums = warpgroup_mma_wait(0, deps=[sums[0], sums[1]])
    return sums


@gluon.jit
def _release(empty, done, TILES: gl.constexpr, STAGES: gl.constexpr):
    for i in gl.static_range(TILES):
        mbarrier.arrive(empty.index((done + i) % STAGES), count=1)


@gluon.jit
def _stored(acc, out_desc, bias_ptr, out, m, row, N):
    """Starts copying out^T + bias, of 64 columns of out from `row` on."""
    mma: gl.constexpr = acc.type.layout
    if bias_ptr is not None:
        n = row + gl.arange(0, 64, gl.SliceLayout(1, mma))
        acc += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
    out.store(acc.to(out.dtype).permute([1, 0]))
    fence_async_shared()
    from_shared(out_desc, [m, row], out)


@gluon.jit
def _stored_part(acc, part, m, M, WIDTH: gl.constexpr):
    """part[n, :] from here on, of rows from m on."""
    mma: gl.constexpr = acc.type.layout
    n = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, mma)), 1)
    at = gl.expand_dims(gl.arange(0, acc.shape[1], gl.SliceLayout(0, mma)), 0)
    # In eights, so that stores stay wide.
    gl.store(part + n * WIDTH + at, acc, mask=m + at // 8 * 8 < M + n * 0)


@gluon.jit
def _consumer(
    W: gl.constexpr, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, IN_TURN: gl.constexpr,
):  # fmt: skip
    xs, codes, scales, full, empty, turns = ring
    M, N, K = sizes
    DTYPE: gl.constexpr = scales.dtype
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    TILES: gl.constexpr = BLOCK_K // 64
    MAIN: gl.constexpr = main_rows(BLOCK_M)
    mma: gl.constexpr = sums_layout(MAIN)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    done = 0
    for unit in range(gl.program_id(0), _units(M, N, BLOCK_M, WARPGROUPS, SPLIT), gl.num_programs(0)):
        block_m, block_n, first, last = _unit(unit, M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
        row = (block_n * WARPGROUPS + W) * 64
        sums = (gl.zeros([64, MAIN], gl.float32, mma),)
        if BLOCK_M > MAIN:
            sums = sums + (gl.zeros([64, BLOCK_M - MAIN], gl.float32, sums_layout(BLOCK_M - MAIN)),)
        pairs, lanes = _centred(codes, scales, zeros, full, done, W, TILES, DTYPE, GROUPS, WARPGROUPS, STAGES)
        a = _operands(pairs, lanes, TILES, DTYPE, a_layout)
        for _ in range(first + TILES, last, TILES):
            running = _product(a, xs, sums, done, turns, W, TILES, WARPGROUPS, STAGES, IN_TURN)
            pairs, lanes = _centred(
                codes, scales, zeros, full, done + TILES, W, TILES, DTYPE, GROUPS, WARPGROUPS, STAGES
            )
            sums = _ended(running)
            _release(empty, done, TILES, STAGES)
            # Not before the wait: ptxas serialises wgmma whose registers are written while another runs.
            a = _operands(pairs, lanes, TILES, DTYPE, a_layout)
            done += TILES
        sums = _ended(_product(a, xs, sums, done, turns, W, TILES, WARPGROUPS, STAGES, IN_TURN))
        _release(empty, done, TILES, STAGES)
        done += TILES
        if SPLIT == 1:
            tma.store_wait(0)
        for j in gl.static_range(len(sums)):
            m = block_m * BLOCK_M + j * MAIN
            if SPLIT == 1:
                _stored(sums[j], out_descs[j], bias_ptr, outs[j].index(W), m, row, N)
            else:
                part = parts_ptr + (unit * WARPGROUPS + W).to(gl.int64) * (64 * BLOCK_M) + j * MAIN
                _stored_part(sums[j], part, m, M, BLOCK_M)
    if SPLIT == 1:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _sm90_prefill(
    out_desc,  # [M, N] in boxes of [main_rows(BLOCK_M), 64]; None where K is split
    rest_desc,  # the same in boxes of the other rows, or None
    x_desc,  # [M, K] in boxes of [main_rows(BLOCK_M), 64]
    box_desc,  # the same in boxes of box_rows(BLOCK_M)
    codes_desc,  # int32 [N/64 * K/64 * 16, 32] in boxes of one tile, layout SM90
    scales_desc,  # [K/G, N_PADDED] in boxes of one tile's groups and rows
    zeros_desc,  # uint8 like scales, or None: every zero point is 8
    bias_ptr,  # [N] or None; with split K _add_parts adds it
    parts_ptr,  # [units, WARPGROUPS * 64, BLOCK_M] fp32, or None for one split
    M,
    N,
    K,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    IN_TURN: gl.constexpr,  # warpgroups start their products one after the other
):
    DTYPE: gl.constexpr = x_desc.dtype
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    let_the_next_kernel_start()
    MAIN: gl.constexpr = main_rows(BLOCK_M)
    xs = (gl.allocate_shared_memory(DTYPE, [STAGES, MAIN, 64], x_desc.layout),)
    if BLOCK_M > MAIN:
        xs = xs + (gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M - MAIN, 64], x_desc.layout),)
    else:
        xs = xs + (xs[0],)  # not used
    codes = gl.allocate_shared_memory(gl.int32, [STAGES * WARPGROUPS, 16, 32], codes_desc.layout)
    scales = gl.allocate_shared_memory(DTYPE, [STAGES * WARPGROUPS, GROUPS, 64], scales_desc.layout)
    if zeros_desc is None:
        zeros: gl.constexpr = None
    else:
        zeros = gl.allocate_shared_memory(gl.uint8, [STAGES * WARPGROUPS, GROUPS, 128], zeros_desc.layout)
    outs = xs  # not used where K is split
    if SPLIT == 1:
        outs = (gl.allocate_shared_memory(DTYPE, [WARPGROUPS, MAIN, 64], out_desc.layout), outs[1])
        if BLOCK_M > MAIN:
            outs = (outs[0], gl.allocate_shared_memory(DTYPE, [WARPGROUPS, BLOCK_M - MAIN, 64], rest_desc.layout))
    out_descs = (out_desc, rest_desc)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    turns = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    C: gl.constexpr = CONSUMER_REGISTERS
    P: gl.constexpr = PRODUCER_REGISTERS
    ring = (xs, codes, scales, full, empty, turns)
    sizes = (M, N, K)
    # fmt: off
    if WARPGROUPS == 1:
        gl.warp_specialize([
            (_consumer, (0, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (_producer, (x_desc, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES)),
        ], [1], [P])
    elif WARPGROUPS == 2:
        gl.warp_specialize([
            (_consumer, (0, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (_consumer, (1, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (_producer, (x_desc, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES)),
        ], [4, 1], [C, P])
    else:
        gl.warp_specialize([
            (_consumer, (0, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (_consumer, (1, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (_consumer, (2, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (_producer, (x_desc, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES)),
        ], [4, 4, 1], [C, C, P])
    # fmt: on


def plan(
    *, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: Sm90PrefillTile
) -> tuple[Launch, ...]:
    """The launches of out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    m, n, k = x.shape[0], weight.n, weight.k
    x = aligned(x, ALIGNMENT)
    blocks_k, rows = triton.cdiv(k, tile.block_k), TILE * tile.warpgroups
    split = triton.cdiv(blocks_k, triton.cdiv(blocks_k, tile.split_k))  # every part has some
    units = triton.cdiv(m, tile.block_m) * triton.cdiv(n, rows) * split
    parts = out.new_empty((units, rows, tile.block_m), dtype=torch.float32) if split > 1 else None
    group = blocks_k * tile.block_k if weight.group == k else weight.group
    codes = weight.codes.view(-1, TILE_WORDS // 16)
    box = gl.NVMMASharedLayout.get_default_for([8, TILE], _GLUON[out.dtype])
    main, whole = main_rows(tile.block_m), split == 1
    rest = tile.block_m - main
    args = {
        "out_desc": TensorDescriptor.from_tensor(out, [main, TILE], box) if whole else None,
        "rest_desc": TensorDescriptor.from_tensor(out, [rest, TILE], box) if whole and rest else None,
        "x_desc": TensorDescriptor.from_tensor(x, [main, TILE], box),
        "box_desc": TensorDescriptor.from_tensor(x, [box_rows(tile.block_m), TILE], box),
        "codes_desc": TensorDescriptor.from_tensor(codes, [16, TILE_WORDS // 16], gl.NVMMASharedLayout(128, 32, 2)),
        "scales_desc": _row_desc(weight.scales, group),
        "zeros_desc": None if weight.zeros is None else _row_desc(weight.zeros, group),
        "bias_ptr": bias if whole else None,
        "parts_ptr": parts,
        "M": m,
        "N": n,
        "K": k,
    }
    consumer, producer, most = registers(tile)
    constants = {
        "GROUP": group,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "WARPGROUPS": tile.warpgroups,
        "SPLIT": split,
        "STAGES": tile.stages,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
        "IN_TURN": tile.in_turn,
    }
    options = {"num_warps": 4, "launch_pdl": True} | ({"maxnreg": most} if tile.registers else {})
    sms = (current_device(x.device) if x.is_cuda else known_device("sm90")).compute_units
    grid = (min(units, sms * tile.residents),)
    gemm = Launch(fn=_sm90_prefill, grid=grid, args=args, constants=constants, options=options)
    return (gemm,) if parts is None else (gemm, addition(out, parts, bias, m, n, split, rows, tile.block_m))


def _row_desc(grid: Tensor, group: int) -> TensorDescriptor:
    """Scales or zero points in boxes of one tile."""
    box = [groups_a_tile(group), max(TILE, BOX_BYTES // grid.itemsize)]
    return TensorDescriptor(
        grid, list(grid.shape), [grid.shape[1], 1], box, gl.NVMMASharedLayout(0, 8 * grid.itemsize, 2)
    )


_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def registers(tile: Sm90PrefillTile) -> tuple[int, int, int]:
    """Registers a thread of consumers, of the producer, and at the start: those of the tile, or all that an SM has."""
    groups = tile.warpgroups + 1
    most = tile.registers or min(65536 // (128 * groups * tile.residents) // 8 * 8, 232)
    # With 152, not 160, ptxas of Triton 3.9 serialises wgmma where three warpgroups keep sums of 192 columns.
    producer = 24 if most <= 80 else 32 if tile.warpgroups == 3 and tile.block_m == 192 else 40
    consumer = min((most * groups - producer) // tile.warpgroups // 8 * 8, 232)
    return consumer, producer, most


sm90_prefill = runs(plan)
