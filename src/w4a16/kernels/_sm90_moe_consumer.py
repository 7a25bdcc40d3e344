"""The consumers of sm90_moe: warpgroups that dequantise two tiles of W a step and multiply them with rows of x."""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated, unreachable"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..compat import STORES_A_FEW_ROWS
from ._sm90 import (
    centred,
    groups_a_tile,
    of_rows,
    operand,
    scale_lanes,
    sums_layout,
    words_layout,
    zero_lanes,
)
from ._sm90_moe_producer import NARROW, PAIRS
from ._sm90_prefill_producer import after

LEAST_SCALE = gl.constexpr(1e-30)  # is added to scales, which may be 0 and divide sums; no scale is its negative


@gluon.constexpr_function
def scales_sums(group):
    """Whether scales multiply the sums at the end of each group, in fp32, and not every weight, which rounds it."""
    return group != 32


@gluon.constexpr_function
def parts(columns):
    """How many products of a power of two of columns make one of 32, 64, 96 or 128."""
    return 2 if columns == 96 else 1


@gluon.constexpr_function
def part_columns(columns, part):
    """96 columns are 64 and 32."""
    return columns if columns != 96 else 64 if part == 0 else 32


@gluon.constexpr_function
def mma_of(columns, part):
    """The layout of the sums of a part."""
    return sums_layout(part_columns(columns, part))


@gluon.jit
def operand_of(
    codes, scales, zeros, at, tile: gl.constexpr, GROUP: gl.constexpr, DTYPE: gl.constexpr, mma: gl.constexpr,
    TILES: gl.constexpr, j: gl.constexpr,
):  # fmt: skip
    """Tile j along K of a tile of rows of stage `at` as operand, and the scales of its rows for the sums."""
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    scale = of_rows(scales.index(at).slice(tile * 64, 64, 1), GROUPS)
    if zeros is None:
        zero = gl.full(scale.shape, 8, gl.int32, scale.type.layout)
    else:
        zero = of_rows(zeros.index(at).slice(tile * 64, 64, 1), GROUPS)
    words = codes.index(at).slice((tile * TILES + j) * 16, 16, 0).load(words_layout(4))
    pairs = centred(words, zero_lanes(zero, DTYPE), DTYPE, 4)
    if scales_sums(GROUP):
        a = operand(pairs, None, DTYPE, 4, a_layout)
        row = scale.reshape([4, 8, 2]).permute([0, 2, 1]).reshape([64])
        row = gl.convert_layout(row, gl.SliceLayout(1, mma), assert_trivial=True).to(gl.float32)
        row += LEAST_SCALE
    else:
        a = operand(pairs, scale_lanes(scale), DTYPE, 4, a_layout)
        row = gl.zeros([64], gl.float32, gl.SliceLayout(1, mma))
    return a, row


@gluon.jit
def started(a, acc, xs, at, COLUMNS: gl.constexpr):
    """Starts acc + a @ x^T for one tile and every part of the columns, of x in place `at` of the ring."""
    ROWS: gl.constexpr = xs[0].shape[1]
    running = ()
    for p in gl.static_range(parts(COLUMNS)):
        room = xs[p * 64 // ROWS].index(at)
        x = room.slice(p * 64 % ROWS, part_columns(COLUMNS, p), 0).permute((1, 0))
        w = gl.convert_layout(a, gl.DotOperandLayout(0, mma_of(COLUMNS, p), 2), assert_trivial=True)
        running = running + (warpgroup_mma(w, x, acc[p], is_async=True),)
    return running


@gluon.jit
def ended(running, operands, COLUMNS: gl.constexpr, LATER: gl.constexpr):
    """The sums of a tile, once all products but those of LATER tiles are there.

    The operands are named here so that they keep their registers until then.
    """
    done_and_operands = warpgroup_mma_wait(LATER * parts(COLUMNS), deps=running + operands)
    return done_and_operands[: parts(COLUMNS)]


@gluon.jit
def scaled(acc, factor, COLUMNS: gl.constexpr):
    """The sums of a tile, each row times its factor."""
    products = ()
    for p in gl.static_range(parts(COLUMNS)):
        each = gl.convert_layout(factor, gl.SliceLayout(1, mma_of(COLUMNS, p)), assert_trivial=True)
        products = products + (acc[p] * gl.expand_dims(each, 1),)
    return products


@gluon.jit
def ratio(x, y):
    """x / y of fp32 by the approximate reciprocal."""
    return gl.inline_asm_elementwise(
        "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _step(
    a, b, row0, row1, acc0, acc1, ring, zeros, before, slot, phase, PART: gl.constexpr, EVEN: gl.constexpr,
    W: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums with 64 columns of K more, the first operand of the next 64, and the stage where those are.

    Each tile is dequantised, and its sums are rescaled, under the product of the other. Sums are in units of their
    rows' scale; those of the next group take its own. PART: 0 and 1 are the first and second 64 of 128 columns, between
    which the second tile's product runs on; 2 is 64 alone. EVEN: groups of 64.
    """
    xs, codes, scales, full, empty = ring
    SUMS: gl.constexpr = scales_sums(GROUP)
    DTYPE: gl.constexpr = xs[0].dtype
    mma: gl.constexpr = mma_of(COLUMNS, 0)
    TILE: gl.constexpr = PART % 2 if TILES == 2 else 0
    at = slot * TILES + TILE
    running0 = started(a, acc0, xs, at, COLUMNS)
    if PART == 1:
        acc1 = ended(acc1, (b,), COLUMNS, 1)
        if TILES == 1:
            mbarrier.arrive(empty.index(before), count=1)
    b, later1 = operand_of(codes, scales, zeros, slot, PAIRS + W, GROUP, DTYPE, mma, TILES, TILE)
    if SUMS and (PART != 1 or EVEN):
        acc1 = scaled(acc1, ratio(row1, later1), COLUMNS)
        row1 = later1
    acc1 = started(b, acc1, xs, at, COLUMNS)
    acc0 = ended(running0, (a,), COLUMNS, 1)
    LAST: gl.constexpr = TILES == 1 or PART == 1  # of its stage
    next_slot, next_phase = slot, phase
    if LAST:
        next_slot, next_phase = after(slot, phase, 1, STAGES)
        mbarrier.wait(full.index(next_slot), next_phase)
    a, later0 = operand_of(codes, scales, zeros, next_slot, W, GROUP, DTYPE, mma, TILES, 0 if LAST else 1)
    if SUMS and (PART == 1 or EVEN):
        acc0 = scaled(acc0, ratio(row0, later0), COLUMNS)
        row0 = later0
    if PART != 0:
        acc1 = ended(acc1, (b,), COLUMNS, 0)
        if LAST:
            mbarrier.arrive(empty.index(slot), count=1)
    return a, b, row0, row1, acc0, acc1, next_slot, next_phase


@gluon.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) of fp32, by the approximate exp2 and reciprocal: five instructions, two bits of 24 lost."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t; }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def activated(x, ACTIVATION: gl.constexpr):
    """The activation of fp32 x, or x itself for None."""
    if ACTIVATION == "silu":
        x = x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 = sigmoid(2 y)
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = gl.maximum(x, 0.0)
    return x


@gluon.jit
def shares_of(shares_ptr, sorted_ptr, slots, row, COLUMNS: gl.constexpr, part: gl.constexpr):
    """What multiplies the sums of a part's columns, the rows of a block from `row` on: [1, columns]."""
    lane = gl.arange(0, part_columns(COLUMNS, part), gl.SliceLayout(0, mma_of(COLUMNS, part)))
    slot = gl.load(sorted_ptr + row + part * 64 + lane)
    return gl.expand_dims(gl.load(shares_ptr + slot, mask=slot < slots, other=0.0).to(gl.float32), 0)


@gluon.constexpr_function
def _rows_layout(bits):
    """Of rows of 64 columns on their way to memory: 16 bytes a thread."""
    pieces = 64 * bits // 128  # a row
    return gl.BlockedLayout([1, 128 // bits], [32 // pieces, pieces], [4, 1], [1, 0])


@gluon.jit
def write(out, room, part, row, column):
    """out[row : row + columns of part, column : column + 64] = part^T, through room in shared memory.

    For the L2 cache to keep until the next kernel reads it: weights, each read once, would take its place.
    """
    out_ptr, stride = out
    ROWS: gl.constexpr = NARROW if STORES_A_FEW_ROWS or room.dtype == gl.float32 else part.shape[1]
    room.store(part.to(room.dtype).permute([1, 0]))
    layout: gl.constexpr = _rows_layout(room.dtype.primitive_bitwidth)
    r = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1)
    c = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    at = out_ptr + (row.to(gl.int64) * stride + column) + (r * stride + c)
    for i in gl.static_range(part.shape[1] // ROWS):
        gl.store(at + i * ROWS * stride, room.slice(i * ROWS, ROWS, 0).load(layout), eviction_policy="evict_last")


@gluon.jit
def _write_parts(out, outs, y, row, column, COLUMNS: gl.constexpr):
    for p in gl.static_range(parts(COLUMNS)):
        write(out, outs.slice(p * 64, part_columns(COLUMNS, p), 0), y[p], row + p * 64, column)


@gluon.jit
def unit_of_pairs(
    W: gl.constexpr, out, shares_ptr, ring, zeros, outs, routing, done, steps, row, column,
    GROUP: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, COLUMNS: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's part of a unit, two tiles of rows of W, whose block has at most COLUMNS rows."""
    xs, codes, scales, full, empty = ring
    sorted_ptr, _, _, _, _, slots, _ = routing
    SUMS: gl.constexpr = scales_sums(GROUP)
    mma: gl.constexpr = mma_of(COLUMNS, 0)
    EVEN: gl.constexpr = SUMS and GROUP % 128 != 0
    DTYPE: gl.constexpr = xs[0].dtype
    acc0, acc1 = (), ()
    for p in gl.static_range(parts(COLUMNS)):
        zero = gl.zeros([64, part_columns(COLUMNS, p)], gl.float32, mma_of(COLUMNS, p))
        acc0 = acc0 + (zero,)
        acc1 = acc1 + (zero,)
    slot, phase = done % STAGES, done // STAGES & 1
    mbarrier.wait(full.index(slot), phase)
    a, row0 = operand_of(codes, scales, zeros, slot, W, GROUP, DTYPE, mma, TILES, 0)
    row1 = row0
    for _ in range((steps * TILES - 1) // 2):
        before = slot
        a, b, row0, row1, acc0, acc1, slot, phase = _step(
            a, a, row0, row1, acc0, acc1, ring, zeros, before, slot, phase, 0, EVEN,
            W, COLUMNS, GROUP, TILES, STAGES,
        )  # fmt: skip
        a, b, row0, row1, acc0, acc1, slot, phase = _step(
            a, b, row0, row1, acc0, acc1, ring, zeros, before, slot, phase, 1, EVEN,
            W, COLUMNS, GROUP, TILES, STAGES,
        )  # fmt: skip
    if steps * TILES % 2 == 0:
        a, b, row0, row1, acc0, acc1, slot, phase = _step(
            a, a, row0, row1, acc0, acc1, ring, zeros, slot, slot, phase, 2, EVEN,
            W, COLUMNS, GROUP, TILES, STAGES,
        )  # fmt: skip
    at = slot * TILES + TILES - 1
    running0 = started(a, acc0, xs, at, COLUMNS)
    b, later1 = operand_of(codes, scales, zeros, slot, PAIRS + W, GROUP, DTYPE, mma, TILES, TILES - 1)
    if SUMS:
        acc1 = scaled(acc1, ratio(row1, later1), COLUMNS)
    running1 = started(b, acc1, xs, at, COLUMNS)
    acc0 = ended(running0, (a,), COLUMNS, 1)
    if SUMS:
        acc0 = scaled(acc0, row0, COLUMNS)
    acc1 = ended(running1, (b,), COLUMNS, 0)
    mbarrier.arrive(empty.index(slot), count=1)
    if SUMS:
        acc1 = scaled(acc1, later1, COLUMNS)
    first, second = (), ()
    for p in gl.static_range(parts(COLUMNS)):
        sum0, sum1 = acc0[p], acc1[p]
        if shares_ptr is not None:
            share = shares_of(shares_ptr, sorted_ptr, slots, row, COLUMNS, p)
            sum0 *= share
            sum1 *= share
        sum0 = activated(sum0, ACTIVATION)
        if GATED:
            first = first + (sum0 * sum1,)
        else:
            first = first + (sum0,)
            second = second + (activated(sum1, ACTIVATION),)
    _write_parts(out, outs.index(W), first, row, column, COLUMNS)
    if not GATED:
        _write_parts(out, outs.index(W), second, row, column + 64 * PAIRS, COLUMNS)
