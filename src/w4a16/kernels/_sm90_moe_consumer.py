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
    wait_for_the_kernel_before,
    words_layout,
    zero_lanes,
)
from ._sm90_moe_producer import BOX_ROWS, WARPGROUPS, boxes_of, marks_of

LEAST_SCALE = gl.constexpr(1e-30)  # stands for 0, which sums cannot be divided by


@gluon.constexpr_function
def scales_sums(group):
    """Whether scales multiply the sums at the end of each group, in fp32, and not every weight, which rounds it."""
    return group != 32


@gluon.constexpr_function
def _parts(columns):
    """How many products of a power of two of columns make one of 32, 64, 96 or 128."""
    return 2 if columns == 96 else 1


@gluon.constexpr_function
def _part_columns(columns, part):
    """96 columns are 64 and 32."""
    return columns if columns != 96 else 64 if part == 0 else 32


@gluon.constexpr_function
def _mma(columns, part):
    """The layout of the sums of a part."""
    return sums_layout(_part_columns(columns, part))


@gluon.jit
def _operands(
    codes, scales, zeros, full, done, W: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHERS: gl.constexpr, DTYPE: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's two tiles of the next stage as operands, and for sums that are scaled the scale of each row."""
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    at = done % STAGES
    mbarrier.wait(full.index(at), done // STAGES & 1)
    a, rows = (), ()
    for i in gl.static_range(2):
        box = at * 2 + i
        scale = of_rows(scales.index(box).slice(W * 64, 64, 1), GROUPS)
        if zeros is None:
            zero = gl.full(scale.shape, 8, gl.int32, scale.type.layout)
        else:
            zero = of_rows(zeros.index(box).slice(W * 64, 64, 1), GROUPS)
        words = codes.index(box).slice(W * 16, 16, 0).load(words_layout(4))
        pairs = centred(words, zero_lanes(zero, DTYPE), DTYPE, 4)
        if scales_sums(GROUP):
            a = a + (operand(pairs, None, DTYPE, 4, a_layout),)
            row = scale.reshape([4, 8, 2]).permute([0, 2, 1]).reshape([64])
            row = gl.convert_layout(row, gl.SliceLayout(1, mma), assert_trivial=True).to(gl.float32)
            rows = rows + (gl.where(row == 0.0, LEAST_SCALE, row),)
        else:
            a = a + (operand(pairs, scale_lanes(scale), DTYPE, 4, a_layout),)
            rows = rows + (gl.zeros([64], gl.float32, gl.SliceLayout(1, mma)),)
    if GATHERS:
        fence_async_shared()
    return a, rows


@gluon.jit
def _multiply(a, acc, xs, COLUMNS: gl.constexpr):
    """Starts acc + a @ x^T for both tiles and every part of the columns."""
    running = ()
    for p in gl.static_range(_parts(COLUMNS)):
        x = xs.slice(p * 64, _part_columns(COLUMNS, p), 0).permute((1, 0))
        for i in gl.static_range(2):
            w = gl.convert_layout(a[i], gl.DotOperandLayout(0, _mma(COLUMNS, p), 2), assert_trivial=True)
            running = running + (warpgroup_mma(w, x, acc[2 * p + i], is_async=True),)
    return running


@gluon.jit
def _scaled(acc, factors, COLUMNS: gl.constexpr):
    """The sums of both tiles, each row times its factor."""
    scaled = ()
    for p in gl.static_range(_parts(COLUMNS)):
        for i in gl.static_range(2):
            factor = gl.convert_layout(factors[i], gl.SliceLayout(1, _mma(COLUMNS, p)), assert_trivial=True)
            scaled = scaled + (acc[2 * p + i] * gl.expand_dims(factor, 1),)
    return scaled


@gluon.jit
def _step(
    a, rows, acc, xs, codes, scales, zeros, full, empty, done, ENDS: gl.constexpr, W: gl.constexpr,
    COLUMNS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """The sums with this step's part, the next step's operands and the scales of its rows.

    ENDS: a group ends with this step. Sums are in units of their rows' scale; those of the next group take its own.
    """
    at = done % STAGES
    running = _multiply(a, acc, xs.index(at), COLUMNS)
    mma: gl.constexpr = _mma(COLUMNS, 0)
    b, later = _operands(
        codes, scales, zeros, full, done + 1, W, GROUP, STAGES, GATHERS, xs.dtype, mma
    )  # fmt: skip
    if ENDS:
        ratios = (rows[0] / later[0], rows[1] / later[1])
    # The operands are named here so that they keep their registers until then: ptxas serialises wgmma whose registers
    # are written while it runs.
    done_and_a = warpgroup_mma_wait(0, deps=running + a)
    mbarrier.arrive(empty.index(at), count=1)
    acc = done_and_a[: 2 * _parts(COLUMNS)]
    if ENDS:
        acc = _scaled(acc, ratios, COLUMNS)
    return b, later, acc


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
def _write(out_desc, outs, y, row, column, COLUMNS: gl.constexpr):
    """out[row : row + COLUMNS, column : column + 64] = y^T, given in parts, through shared memory."""
    tma.store_wait(0)
    for p in gl.static_range(_parts(COLUMNS)):
        part = y[p]
        outs.slice(p * 64, _part_columns(COLUMNS, p), 0).store(part.to(outs.dtype).permute([1, 0]))
    fence_async_shared()
    for i in gl.static_range(COLUMNS // BOX_ROWS):
        from_shared(out_desc, [row + i * BOX_ROWS, column], outs.slice(i * BOX_ROWS, BOX_ROWS, 0))


@gluon.jit
def _product(
    W: gl.constexpr, out_desc, shares_ptr, ring, zeros, outs, routing, done, steps, row, column,
    GROUP: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """The product of this warpgroup's two tiles of rows of W with the first COLUMNS rows of a block."""
    xs, codes, scales, full, empty = ring
    sorted_ptr, _, _, slots = routing
    SUMS: gl.constexpr = scales_sums(GROUP)
    mma: gl.constexpr = _mma(COLUMNS, 0)
    acc = ()
    for p in gl.static_range(_parts(COLUMNS)):
        zero = gl.zeros([64, _part_columns(COLUMNS, p)], gl.float32, _mma(COLUMNS, p))
        acc = acc + (zero, zero)
    a, rows = _operands(
        codes, scales, zeros, full, done, W, GROUP, STAGES, GATHERS, xs.dtype, mma
    )  # fmt: skip
    # In twos, so that the operands of one step and of the next have registers of their own.
    for _ in range((steps - 1) // 2):
        a, rows, acc = _step(
            a, rows, acc, xs, codes, scales, zeros, full, empty, done, SUMS and GROUP % 128 != 0,
            W, COLUMNS, GROUP, STAGES, GATHERS,
        )  # fmt: skip
        a, rows, acc = _step(
            a, rows, acc, xs, codes, scales, zeros, full, empty, done + 1, SUMS,
            W, COLUMNS, GROUP, STAGES, GATHERS,
        )  # fmt: skip
        done += 2
    if steps % 2 == 0:
        a, rows, acc = _step(
            a, rows, acc, xs, codes, scales, zeros, full, empty, done, SUMS and GROUP % 128 != 0,
            W, COLUMNS, GROUP, STAGES, GATHERS,
        )  # fmt: skip
        done += 1
    at = done % STAGES
    acc = warpgroup_mma_wait(0, deps=_multiply(a, acc, xs.index(at), COLUMNS))
    mbarrier.arrive(empty.index(at), count=1)
    if SUMS:
        acc = _scaled(acc, rows, COLUMNS)
    first, second = (), ()
    for p in gl.static_range(_parts(COLUMNS)):
        acc0, acc1 = acc[2 * p], acc[2 * p + 1]
        if shares_ptr is not None:
            lane = gl.arange(0, _part_columns(COLUMNS, p), gl.SliceLayout(0, _mma(COLUMNS, p)))
            slot = gl.load(sorted_ptr + row + p * 64 + lane)
            share = gl.expand_dims(gl.load(shares_ptr + slot, mask=slot < slots, other=0.0).to(gl.float32), 0)
            acc0 *= share
            acc1 *= share
        acc0 = activated(acc0, ACTIVATION)
        if GATED:
            first = first + (acc0 * acc1,)
        else:
            first = first + (acc0,)
            second = second + (activated(acc1, ACTIVATION),)
    _write(out_desc, outs, first, row, column, COLUMNS)
    if not GATED:
        _write(out_desc, outs, second, row, column + 64 * WARPGROUPS, COLUMNS)


@gluon.jit
def consume(
    W: gl.constexpr, out_desc, shares_ptr, ring, zeros, outs, routing, sizes,
    GROUP: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's part of every unit: a block of the route times WARPGROUPS pairs of tiles."""
    sorted_ptr, _, used_ptr, slots = routing
    K, tiles_n, _ = sizes
    steps = gl.cdiv(K, 64)
    units_n = gl.cdiv(gl.cdiv(tiles_n, 2), WARPGROUPS)
    WIDTH: gl.constexpr = 64 * WARPGROUPS if GATED else 128 * WARPGROUPS
    if GATHERS:
        wait_for_the_kernel_before()
    units = gl.load(used_ptr) // BLOCK_M * units_n
    marks = marks_of(sorted_ptr, gl.program_id(0), units, units_n, BLOCK_M)
    done = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, column = unit // units_n * BLOCK_M, unit % units_n * WIDTH + W * 64
        boxes = boxes_of(marks, slots, BLOCK_M)
        marks = marks_of(sorted_ptr, unit + gl.num_programs(0), units, units_n, BLOCK_M)
        for i in gl.static_range(1, BLOCK_M // BOX_ROWS + 1):
            if boxes == i:
                _product(
                    W, out_desc, shares_ptr, ring, zeros, outs.index(W), routing, done, steps, row, column,
                    GROUP, GATED, ACTIVATION, i * BOX_ROWS, STAGES, GATHERS,
                )  # fmt: skip
        done += steps
    tma.store_wait(0)
