"""The consumers of sm90_moe where each of four warpgroups has one tile of W: some dequantise while others multiply.

For blocks of up to 96 rows, whose sums then leave registers enough. Where gated, two warpgroups have gate rows and two
the up rows that belong to them, which they hand over through shared memory at the end of a unit.
"""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..compat import workgroup_barrier
from ._sm90_moe_consumer import (
    activated,
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
    write,
)
from ._sm90_moe_producer import PAIRS
from ._sm90_prefill_producer import after


@gluon.jit
def _step(
    acc, row, ring, zeros, slot, phase, W: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """The sums with this step's part, in units of its group's scales."""
    xs, codes, scales, full, empty = ring
    DTYPE: gl.constexpr = xs[0].dtype
    mma: gl.constexpr = mma_of(COLUMNS, 0)
    mbarrier.wait(full.index(slot), phase)
    a, later = operand_of(codes, scales, zeros, slot, W, GROUP, DTYPE, mma, TILES, 0)
    if scales_sums(GROUP):
        acc = scaled(acc, ratio(row, later), COLUMNS)
    running = started(a, acc, xs, slot * TILES, COLUMNS)
    operands = (a,)
    if TILES == 2:
        if parts(COLUMNS) == 2:  # ptxas would serialise two tiles' products of two parts each
            running, operands = ended(running, operands, COLUMNS, 0), ()
        b, _ = operand_of(codes, scales, zeros, slot, W, GROUP, DTYPE, mma, TILES, 1)
        running = started(b, running, xs, slot * TILES + 1, COLUMNS)
        operands = operands + (b,)
    acc = ended(running, operands, COLUMNS, 0)
    mbarrier.arrive(empty.index(slot), count=1)
    return acc, later


@gluon.jit
def _product(
    ring, zeros, done, steps, W: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, TILES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's tile of rows of W times the first COLUMNS rows of a block."""
    acc = ()
    for p in gl.static_range(parts(COLUMNS)):
        acc = acc + (gl.zeros([64, part_columns(COLUMNS, p)], gl.float32, mma_of(COLUMNS, p)),)
    row = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, mma_of(COLUMNS, 0)))
    slot, phase = done % STAGES, done // STAGES & 1
    for _ in range(steps):
        acc, row = _step(acc, row, ring, zeros, slot, phase, W, COLUMNS, GROUP, TILES)
        slot, phase = after(slot, phase, 1, STAGES)
    if scales_sums(GROUP):
        acc = scaled(acc, row, COLUMNS)
    return acc


@gluon.jit
def _finished(
    part, shares_ptr, sorted_ptr, slots, row, ACTIVATION: gl.constexpr, COLUMNS: gl.constexpr, p: gl.constexpr,
):  # fmt: skip
    """The activation of a part's sums, times the shares of the block's rows."""
    if shares_ptr is not None:
        part *= shares_of(shares_ptr, sorted_ptr, slots, row, COLUMNS, p)
    return activated(part, ACTIVATION)


@gluon.jit
def unit_of_tile(
    W: gl.constexpr, out, shares_ptr, ring, zeros, outs, handing, routing, done, turn, steps, row, column,
    GROUP: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, COLUMNS: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's part of a unit whose block has at most COLUMNS rows.

    Where gated, those with up sums leave them for those with the gate's, once these have taken the unit before's.
    """
    sorted_ptr, _, _, _, _, slots, _ = routing
    acc = _product(ring, zeros, done, steps, W, COLUMNS, GROUP, TILES, STAGES)
    GIVES: gl.constexpr = GATED and W >= PAIRS
    if GATED:
        rooms, given, taken = handing
        PAIR: gl.constexpr = W % PAIRS
        if GIVES:
            mbarrier.wait(taken.index(PAIR), (turn & 1) ^ 1)
        else:
            mbarrier.wait(given.index(PAIR), turn & 1)
    for p in gl.static_range(parts(COLUMNS)):  # one finished and written after the other: registers
        y = _finished(acc[p], shares_ptr, sorted_ptr, slots, row, None if GIVES else ACTIVATION, COLUMNS, p)
        if GATED:
            room = rooms[p].index(PAIR).slice(0, part_columns(COLUMNS, p), 0)
            if GIVES:
                room.store(y.permute([1, 0]))
            else:
                y *= room.permute((1, 0)).load(mma_of(COLUMNS, p))
            if p == parts(COLUMNS) - 1:
                workgroup_barrier()
                mbarrier.arrive(given.index(PAIR) if GIVES else taken.index(PAIR), count=1)
        if not GIVES:
            write(out, outs.index(W).slice(0, y.shape[1], 0), y, row + p * 64, column + W * 64)
