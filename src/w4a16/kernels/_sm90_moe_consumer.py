"""The consumers of sm90_moe: warpgroups that dequantise two tiles of W a step and multiply them with rows of x."""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated, unreachable"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..compat import from_shared
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
from ._sm90_moe_producer import BOX_ROWS, PAIRS

LEAST_SCALE = gl.constexpr(1e-30)  # stands for 0 and for less, which sums cannot be divided by


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
    codes, scales, zeros, at, tile: gl.constexpr, GROUP: gl.constexpr, DTYPE: gl.constexpr, mma: gl.constexpr
):
    """A tile of stage `at` as operand, and the scales of its rows for the sums."""
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    scale = of_rows(scales.index(at).slice(tile * 64, 64, 1), GROUPS)
    if zeros is None:
        zero = gl.full(scale.shape, 8, gl.int32, scale.type.layout)
    else:
        zero = of_rows(zeros.index(at).slice(tile * 64, 64, 1), GROUPS)
    words = codes.index(at).slice(tile * 16, 16, 0).load(words_layout(4))
    pairs = centred(words, zero_lanes(zero, DTYPE), DTYPE, 4)
    if scales_sums(GROUP):
        a = operand(pairs, None, DTYPE, 4, a_layout)
        row = scale.reshape([4, 8, 2]).permute([0, 2, 1]).reshape([64])
        row = gl.convert_layout(row, gl.SliceLayout(1, mma), assert_trivial=True).to(gl.float32)
        row = gl.where(gl.abs(row) < LEAST_SCALE, LEAST_SCALE, row)
    else:
        a = operand(pairs, scale_lanes(scale), DTYPE, 4, a_layout)
        row = gl.zeros([64], gl.float32, gl.SliceLayout(1, mma))
    return a, row


@gluon.jit
def started(a, acc, xs, COLUMNS: gl.constexpr):
    """Starts acc + a @ x^T for one tile and every part of the columns."""
    running = ()
    for p in gl.static_range(parts(COLUMNS)):
        x = xs.slice(p * 64, part_columns(COLUMNS, p), 0).permute((1, 0))
        w = gl.convert_layout(a, gl.DotOperandLayout(0, mma_of(COLUMNS, p), 2), assert_trivial=True)
        running = running + (warpgroup_mma(w, x, acc[p], is_async=True),)
    return running


@gluon.jit
def ended(running, a, COLUMNS: gl.constexpr, LATER: gl.constexpr):
    """The sums of a tile, once all products but those of LATER tiles are there.

    The operand is named here so that it keeps its registers until then.
    """
    done_and_a = warpgroup_mma_wait(LATER * parts(COLUMNS), deps=running + (a,))
    return done_and_a[: parts(COLUMNS)]


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
def awaited(full, done, STAGES: gl.constexpr, GATHERS: gl.constexpr):
    """The stage of a step, once it is filled."""
    at = done % STAGES
    mbarrier.wait(full.index(at), done // STAGES & 1)
    if GATHERS:
        fence_async_shared()
    return at


@gluon.jit
def _step(
    a, b, row0, row1, acc0, acc1, xs, codes, scales, zeros, full, empty, done, PART: gl.constexpr, EVEN: gl.constexpr,
    W: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """The sums with this step's part, and the next step's first operand.

    Each tile is dequantised, and its sums are rescaled, under the product of the other. Sums are in units of their
    rows' scale; those of the next group take its own. PART: 0 and 1 are the first and second of two steps, between
    which the second tile's product runs on; 2 is one alone. EVEN: groups of 64.
    """
    SUMS: gl.constexpr = scales_sums(GROUP)
    mma: gl.constexpr = mma_of(COLUMNS, 0)
    at = done % STAGES
    x = xs.index(at)
    running0 = started(a, acc0, x, COLUMNS)
    if PART == 1:
        acc1 = ended(acc1, b, COLUMNS, 1)
        mbarrier.arrive(empty.index((done - 1) % STAGES), count=1)
    b, later1 = operand_of(codes, scales, zeros, at, PAIRS + W, GROUP, xs.dtype, mma)
    if SUMS and (PART != 1 or EVEN):
        acc1 = scaled(acc1, ratio(row1, later1), COLUMNS)
        row1 = later1
    acc1 = started(b, acc1, x, COLUMNS)
    acc0 = ended(running0, a, COLUMNS, 1)
    a, later0 = operand_of(codes, scales, zeros, awaited(full, done + 1, STAGES, GATHERS), W, GROUP, xs.dtype, mma)
    if SUMS and (PART == 1 or EVEN):
        acc0 = scaled(acc0, ratio(row0, later0), COLUMNS)
        row0 = later0
    if PART != 0:
        acc1 = ended(acc1, b, COLUMNS, 0)
        mbarrier.arrive(empty.index(at), count=1)
    return a, b, row0, row1, acc0, acc1


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


@gluon.jit
def _write(out_desc, outs, y, row, column, COLUMNS: gl.constexpr):
    """out[row : row + COLUMNS, column : column + 64] = y^T, given in parts, through shared memory."""
    for p in gl.static_range(parts(COLUMNS)):
        part = y[p]
        outs.slice(p * 64, part_columns(COLUMNS, p), 0).store(part.to(outs.dtype).permute([1, 0]))
    fence_async_shared()
    for i in gl.static_range(COLUMNS // BOX_ROWS):
        from_shared(out_desc, [row + i * BOX_ROWS, column], outs.slice(i * BOX_ROWS, BOX_ROWS, 0))


@gluon.jit
def unit_of_pairs(
    W: gl.constexpr, out_desc, shares_ptr, ring, zeros, outs, routing, done, steps, row, column,
    GROUP: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's part of a unit, two tiles of rows of W, whose block has at most COLUMNS rows."""
    xs, codes, scales, full, empty = ring
    sorted_ptr, _, _, _, _, slots, _ = routing
    SUMS: gl.constexpr = scales_sums(GROUP)
    mma: gl.constexpr = mma_of(COLUMNS, 0)
    EVEN: gl.constexpr = SUMS and GROUP % 128 != 0
    acc0, acc1 = (), ()
    for p in gl.static_range(parts(COLUMNS)):
        zero = gl.zeros([64, part_columns(COLUMNS, p)], gl.float32, mma_of(COLUMNS, p))
        acc0 = acc0 + (zero,)
        acc1 = acc1 + (zero,)
    a, row0 = operand_of(codes, scales, zeros, awaited(full, done, STAGES, GATHERS), W, GROUP, xs.dtype, mma)
    row1 = row0
    for _ in range((steps - 1) // 2):
        a, b, row0, row1, acc0, acc1 = _step(
            a, a, row0, row1, acc0, acc1, xs, codes, scales, zeros, full, empty, done, 0, EVEN,
            W, COLUMNS, GROUP, STAGES, GATHERS,
        )  # fmt: skip
        a, b, row0, row1, acc0, acc1 = _step(
            a, b, row0, row1, acc0, acc1, xs, codes, scales, zeros, full, empty, done + 1, 1, EVEN,
            W, COLUMNS, GROUP, STAGES, GATHERS,
        )  # fmt: skip
        done += 2
    if steps % 2 == 0:
        a, b, row0, row1, acc0, acc1 = _step(
            a, a, row0, row1, acc0, acc1, xs, codes, scales, zeros, full, empty, done, 2, EVEN,
            W, COLUMNS, GROUP, STAGES, GATHERS,
        )  # fmt: skip
        done += 1
    at = done % STAGES
    running0 = started(a, acc0, xs.index(at), COLUMNS)
    b, later1 = operand_of(codes, scales, zeros, at, PAIRS + W, GROUP, xs.dtype, mma)
    if SUMS:
        acc1 = scaled(acc1, ratio(row1, later1), COLUMNS)
    running1 = started(b, acc1, xs.index(at), COLUMNS)
    acc0 = ended(running0, a, COLUMNS, 1)
    if SUMS:
        acc0 = scaled(acc0, row0, COLUMNS)
    acc1 = ended(running1, b, COLUMNS, 0)
    mbarrier.arrive(empty.index(at), count=1)
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
    ROOMS: gl.constexpr = outs.shape[0] // PAIRS
    tma.store_wait(0)
    _write(out_desc, outs.index(W * ROOMS), first, row, column, COLUMNS)
    if not GATED:
        if ROOMS == 1:
            tma.store_wait(0)
        _write(out_desc, outs.index(W * ROOMS + ROOMS - 1), second, row, column + 64 * PAIRS, COLUMNS)
