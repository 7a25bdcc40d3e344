"""The consumers of sm90_moe where each of four warpgroups has one tile of W: some dequantise while others multiply.

For blocks of up to 96 rows, whose sums then leave registers enough. Where gated, two warpgroups have gate rows and two
the up rows that belong to them, which they hand over through shared memory at the end of a unit.
"""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..compat import from_shared, workgroup_barrier
from ._sm90_moe_consumer import (
    activated,
    awaited,
    ended,
    mma_of,
    operand_of,
    part_columns,
    parts,
    ratio,
    scaled,
    scales_sums,
    shares_of,
    started,
)
from ._sm90_moe_producer import BOX_ROWS, PAIRS


@gluon.jit
def _step(
    acc, row, ring, zeros, done, RESCALES: gl.constexpr, W: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """The sums with this step's part; RESCALES: which may be of another group, whose scales are then their unit."""
    xs, codes, scales, full, empty = ring
    at = awaited(full, done, STAGES, GATHERS)
    a, later = operand_of(codes, scales, zeros, at, W, GROUP, xs.dtype, mma_of(COLUMNS, 0))
    if RESCALES:
        acc = scaled(acc, ratio(row, later), COLUMNS)
        row = later
    acc = ended(started(a, acc, xs.index(at), COLUMNS), a, COLUMNS, 0)
    mbarrier.arrive(empty.index(at), count=1)
    return acc, row


@gluon.jit
def _product(
    ring, zeros, done, steps, W: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    GATHERS: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's tile of rows of W times the first COLUMNS rows of a block.

    Sums are in units of their rows' scale, from group to group.
    """
    SUMS: gl.constexpr = scales_sums(GROUP)
    EVERY: gl.constexpr = SUMS and GROUP % 128 != 0
    acc = ()
    for p in gl.static_range(parts(COLUMNS)):
        acc = acc + (gl.zeros([64, part_columns(COLUMNS, p)], gl.float32, mma_of(COLUMNS, p)),)
    row = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, mma_of(COLUMNS, 0)))
    for _ in range(steps // 2):
        acc, row = _step(acc, row, ring, zeros, done, SUMS, W, COLUMNS, GROUP, STAGES, GATHERS)
        acc, row = _step(acc, row, ring, zeros, done + 1, EVERY, W, COLUMNS, GROUP, STAGES, GATHERS)
        done += 2
    if steps % 2 == 1:
        acc, row = _step(acc, row, ring, zeros, done, SUMS, W, COLUMNS, GROUP, STAGES, GATHERS)
    if SUMS:
        acc = scaled(acc, row, COLUMNS)
    return acc


@gluon.jit
def _write(out_desc, outs, y, row, column, COLUMNS: gl.constexpr):
    """out[row : row + COLUMNS, column : column + 64] = y^T, given in parts, through shared memory as it has room."""
    for p in gl.static_range(parts(COLUMNS)):
        if p * 64 % outs.shape[0] == 0:
            tma.store_wait(0)
        room = outs.slice(p * 64 % outs.shape[0], part_columns(COLUMNS, p), 0)
        part = y[p]
        room.store(part.to(outs.dtype).permute([1, 0]))
        fence_async_shared()
        for i in gl.static_range(part_columns(COLUMNS, p) // BOX_ROWS):
            from_shared(out_desc, [row + p * 64 + i * BOX_ROWS, column], room.slice(i * BOX_ROWS, BOX_ROWS, 0))


@gluon.jit
def _finished(
    acc, shares_ptr, sorted_ptr, slots, row, ACTIVATION: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """The activation of sums, times the shares of the block's rows."""
    finished = ()
    for p in gl.static_range(parts(COLUMNS)):
        part = acc[p]
        if shares_ptr is not None:
            part *= shares_of(shares_ptr, sorted_ptr, slots, row, COLUMNS, p)
        finished = finished + (activated(part, ACTIVATION),)
    return finished


@gluon.jit
def _give(up, handing, pair: gl.constexpr, turn, COLUMNS: gl.constexpr):
    """Leaves the up sums of a unit for the warpgroup that has the gate, once those of the unit before are taken."""
    rooms, given, taken = handing
    mbarrier.wait(taken.index(pair), (turn & 1) ^ 1)
    for p in gl.static_range(parts(COLUMNS)):
        rooms.index(pair).slice(p * 64, part_columns(COLUMNS, p), 0).store(up[p].permute([1, 0]))
    workgroup_barrier()
    mbarrier.arrive(given.index(pair), count=1)


@gluon.jit
def _times_given(gate, handing, pair: gl.constexpr, turn, COLUMNS: gl.constexpr):
    """The gate's sums times the up sums of the same unit."""
    rooms, given, taken = handing
    mbarrier.wait(given.index(pair), turn & 1)
    both = ()
    for p in gl.static_range(parts(COLUMNS)):
        room = rooms.index(pair).slice(p * 64, part_columns(COLUMNS, p), 0).permute((1, 0))
        both = both + (gate[p] * room.load(mma_of(COLUMNS, p)),)
    workgroup_barrier()
    mbarrier.arrive(taken.index(pair), count=1)
    return both


@gluon.jit
def unit_of_tile(
    W: gl.constexpr, out_desc, shares_ptr, ring, zeros, outs, handing, routing, done, turn, steps, row, column,
    GROUP: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's part of a unit whose block has at most COLUMNS rows."""
    sorted_ptr, _, _, _, _, slots, _ = routing
    acc = _product(ring, zeros, done, steps, W, COLUMNS, GROUP, STAGES, GATHERS)
    if GATED and W >= PAIRS:
        _give(_finished(acc, shares_ptr, sorted_ptr, slots, row, None, COLUMNS), handing, W - PAIRS, turn, COLUMNS)
    else:
        y = _finished(acc, shares_ptr, sorted_ptr, slots, row, ACTIVATION, COLUMNS)
        if GATED:
            y = _times_given(y, handing, W, turn, COLUMNS)
        _write(out_desc, outs.index(W), y, row, column + W * 64, COLUMNS)
