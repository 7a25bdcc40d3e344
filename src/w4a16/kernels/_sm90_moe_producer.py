"""The producer of sm90_moe: tiles of W by TMA, rows of x gathered, or by TMA where they stand in order."""

# mypy: disable-error-code="assignment, attr-defined, no-untyped-def, untyped-decorator, var-annotated, unreachable"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..compat import copy_to_shared, reinterpreted, to_shared, workgroup_barrier
from ._sm90 import let_the_next_kernel_start, wait_for_the_kernel_before
from ._sm90_prefill_producer import after

PAIRS = gl.constexpr(2)  # of tiles of 64 rows of W, of a program: where gated, of a gate tile and its up tile
BOX_ROWS = gl.constexpr(32)  # of x: a block takes as many boxes as it has rows
NARROW = gl.constexpr(16)  # rows of a smaller box, for a block with no more
THREE_BOXES = gl.constexpr(4)  # the number of 96 rows, for `columns_of`


@gluon.constexpr_function
def columns_of(width):
    """The columns of a block's products, by the number that says how many rows it has."""
    return NARROW if width == 1 else (width - 1) * BOX_ROWS


@gluon.constexpr_function
def _x_layout():
    """Of rows of x on their way to shared memory by a warpgroup: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _word_layout():
    """Of one word, which every thread has."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def tell(told, turn, word):
    """The producer's next word for the consumers, of which they read one a unit."""
    words, said, heard = told
    at = turn % 2
    mbarrier.wait(heard.index(at), (turn // 2 & 1) ^ 1)
    words.index(at).store(gl.full([1], word, gl.int32, _word_layout()))
    workgroup_barrier()
    mbarrier.arrive(said.index(at), count=1)


@gluon.jit
def hear(told, turn):
    """That word."""
    words, said, heard = told
    at = turn % 2
    mbarrier.wait(said.index(at), turn // 2 & 1)
    word = gl.max(words.index(at).load(_word_layout()), 0)
    mbarrier.arrive(heard.index(at), count=1)
    return word


@gluon.jit
def _block_of(order_ptr, unit, units, units_n):
    """The block of a unit; of the last unit for one past that, 0 where there is none."""
    return gl.load(order_ptr + gl.minimum(unit, units - 1) // units_n, mask=units > 0, other=0)


@gluon.jit
def _marks_of(sorted_ptr, block, BLOCK_M: gl.constexpr):
    """A block's slots past NARROW rows and past each box but the last: padding where it has no more than that."""
    marks = (gl.load(sorted_ptr + block * BLOCK_M + NARROW),)
    for i in gl.static_range(1, BLOCK_M // BOX_ROWS):
        marks = marks + (gl.load(sorted_ptr + block * BLOCK_M + i * BOX_ROWS),)
    return marks


@gluon.jit
def _width_of(marks, slots, BLOCK_M: gl.constexpr):
    """How many rows a block has, as a number for `columns_of`."""
    width = 1
    for i in gl.static_range(BLOCK_M // BOX_ROWS):
        width += (marks[i] < slots).to(gl.int32)
    return width


@gluon.jit
def _slots_of(sorted_ptr, block, BLOCK_M: gl.constexpr):
    """The slots of a block, box by box."""
    lane = gl.arange(0, BOX_ROWS, gl.SliceLayout(1, _x_layout()))
    slots = ()
    for i in gl.static_range(BLOCK_M // BOX_ROWS):
        slots = slots + (gl.load(sorted_ptr + block * BLOCK_M + i * BOX_ROWS + lane),)
    return slots


@gluon.jit
def _rows_of(x_ptr, x_stride, slot, slots, top_k, BLOCK_M: gl.constexpr):
    """Pointers to the first 64 columns of the rows of x that slots stand for, and which these are, box by box."""
    k = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, _x_layout())), 0)
    rows, theirs = (), ()
    for i in gl.static_range(BLOCK_M // BOX_ROWS):
        row = gl.minimum(slot[i], slots - 1) // top_k
        pointers = x_ptr + (gl.expand_dims(row.to(gl.int64) * x_stride, 1) + k)
        rows = rows + (pointers,)
        theirs = theirs + (gl.broadcast(gl.expand_dims(slot[i] < slots, 1), pointers)[0],)
    return rows, theirs


@gluon.jit
def _box_of(xs, at, i: gl.constexpr):
    """Box i of the rows of x in place `at` of the ring."""
    ROWS: gl.constexpr = xs[0].shape[1]
    return xs[i * BOX_ROWS // ROWS].index(at).slice(i * BOX_ROWS % ROWS, BOX_ROWS, 0)


@gluon.jit
def _gather(rows, theirs, xs, column, K, WHOLE: gl.constexpr):
    """Starts copying 64 columns of some rows of x; zeros for padding, which reads nothing, and past the end of K."""
    if not WHOLE:
        k = gl.expand_dims(column + gl.arange(0, 64, gl.SliceLayout(0, _x_layout())), 0)
        theirs = theirs & (k < K)
    copy_to_shared(xs, rows + column, mask=theirs)


@gluon.jit
def _gathered(full, at, LATER: gl.constexpr):
    """Arrives at stage `at` when its rows of x are there, for wgmma to see; LATER stages' are still on their way."""
    async_copy.wait_group(LATER)
    fence_async_shared()
    workgroup_barrier()
    mbarrier.arrive(full.index(at), count=1)


@gluon.jit
def _ask_x(x_desc, narrow_desc, xs, at, full, row, width, step, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    """Starts copying a step's columns of as many rows of x, from `row` on, as products have columns, to stage `at`."""
    for j in gl.static_range(TILES):
        column = (step * TILES + j) * 64
        if width == 1:
            to_shared(narrow_desc, [row, column], full.index(at), _box_of(xs, at * TILES + j, 0).slice(0, NARROW, 0))
        for i in gl.static_range(BLOCK_M // BOX_ROWS):
            if i < width - 1:
                to_shared(x_desc, [row + i * BOX_ROWS, column], full.index(at), _box_of(xs, at * TILES + j, i))


@gluon.jit
def _ask_weight(
    w, ring, zeros, expert, n, step, at, width, sizes,
    GROUP: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """Starts copying the tiles of W of one step into stage `at`, and says how many bytes will come by TMA."""
    codes_desc, scales_desc, zeros_desc = w
    _, codes, scales, full, _ = ring
    _, tiles_n, groups = sizes
    SCALED: gl.constexpr = codes_desc.block_type.nbytes + scales_desc.block_type.nbytes
    BYTES: gl.constexpr = SCALED if zeros_desc is None else SCALED + zeros_desc.block_type.nbytes
    if GATHERS:
        mbarrier.expect(full.index(at), BYTES)
    else:
        for i in gl.static_range(1, BLOCK_M // BOX_ROWS + 2):
            mbarrier.expect(full.index(at), BYTES + columns_of(i) * TILES * 128, pred=width == i)
    if GATED:  # rows of the gate tiles and, in the second half, of the up tiles
        half, row = expert * 2, n * PAIRS
    else:
        half, row = 0, expert * tiles_n + n * (2 * PAIRS)
    box = reinterpreted(codes.index(at), gl.int32, codes_desc.block_shape, codes_desc.layout)
    to_shared(codes_desc, [half, row, step * TILES * 16, 0], full.index(at), box)
    group = expert * groups + step * TILES * 64 // GROUP
    first = n * (PAIRS * 64) if GATED else n * (2 * PAIRS * 64)
    at_scales = reinterpreted(scales.index(at), scales.dtype, scales_desc.block_shape, scales_desc.layout)
    to_shared(scales_desc, [group, 0, first], full.index(at), at_scales)
    if zeros_desc is not None:
        at_zeros = reinterpreted(zeros.index(at), zeros.dtype, zeros_desc.block_shape, zeros_desc.layout)
        to_shared(zeros_desc, [group, 0, first], full.index(at), at_zeros)


@gluon.jit
def produce(
    x, w, ring, zeros, told, routing, sizes,
    GROUP: gl.constexpr, GATED: gl.constexpr, WHOLE: gl.constexpr, BLOCK_M: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the ring, unit after unit, and tells the consumers which these are.

    Units differ in work: they come in the route's order, and each program takes the next one when it is free, but for
    its first two. What a unit needs of the route is asked for a unit ahead, and its block two ahead.
    """
    xs, _, _, full, empty = ring
    x_ptr, x_stride, x_desc, narrow_desc = x
    sorted_ptr, expert_ptr, order_ptr, used_ptr, taken_ptr, slots, top_k = routing
    K, tiles_n, _ = sizes
    GATHERS: gl.constexpr = x_ptr is not None
    steps = gl.cdiv(K, 64 * TILES)
    units_n = gl.cdiv(tiles_n, 2 * PAIRS)
    if GATHERS:
        wait_for_the_kernel_before()
        let_the_next_kernel_start()
    units = gl.load(used_ptr) // BLOCK_M * units_n
    unit, later, turn = gl.program_id(0), gl.program_id(0) + gl.num_programs(0), 0
    block, next_block = _block_of(order_ptr, unit, units, units_n), _block_of(order_ptr, later, units, units_n)
    expert = gl.load(expert_ptr + block)
    marks = _marks_of(sorted_ptr, block, BLOCK_M)
    if GATHERS:
        early = 0
        rows, theirs = _rows_of(x_ptr, x_stride, _slots_of(sorted_ptr, block, BLOCK_M), slots, top_k, BLOCK_M)
    else:
        # Neither the weight nor the route is of the kernel before: the first tiles are asked for while that still runs.
        early = gl.minimum(STAGES, steps) * (unit < units).to(gl.int32)
        width = _width_of(marks, slots, BLOCK_M)
        for step in range(early):
            _ask_weight(
                w, ring, zeros, expert, unit % units_n, step, step, width, sizes,
                GROUP, GATED, BLOCK_M, TILES, GATHERS,
            )  # fmt: skip
        wait_for_the_kernel_before()
        let_the_next_kernel_start()
        for step in range(early):
            _ask_x(x_desc, narrow_desc, xs, step, full, block * BLOCK_M, width, step, BLOCK_M, TILES)
    at, phase = after(0, 0, early, STAGES)
    before = -1  # the stage asked for last, where rows are gathered
    while unit < units:
        n = unit % units_n
        width = _width_of(marks, slots, BLOCK_M)
        tell(told, turn, (block * units_n + n) * 8 + width)
        latest = gl.atomic_add(taken_ptr, 1, sem="relaxed") + 2 * gl.num_programs(0)
        later_block = _block_of(order_ptr, latest, units, units_n)
        next_expert = gl.load(expert_ptr + next_block)
        next_marks = _marks_of(sorted_ptr, next_block, BLOCK_M)
        if GATHERS:
            next_slots = _slots_of(sorted_ptr, next_block, BLOCK_M)
        for step in range(early * (turn == 0).to(gl.int32), steps):
            mbarrier.wait(empty.index(at), phase ^ 1)
            _ask_weight(
                w, ring, zeros, expert, n, step, at, width, sizes,
                GROUP, GATED, BLOCK_M, TILES, GATHERS,
            )  # fmt: skip
            if GATHERS:
                for i in gl.static_range(BLOCK_M // BOX_ROWS):
                    if i == 0 or i < width - 1:
                        for j in gl.static_range(TILES):
                            column = (step * TILES + j) * 64
                            _gather(rows[i], theirs[i], _box_of(xs, at * TILES + j, i), column, K, WHOLE)
                async_copy.commit_group()
                if before >= 0:
                    _gathered(full, before, 1)
                before = at
            else:
                _ask_x(x_desc, narrow_desc, xs, at, full, block * BLOCK_M, width, step, BLOCK_M, TILES)
            at, phase = after(at, phase, 1, STAGES)
        expert = next_expert
        marks = next_marks
        if GATHERS:
            rows, theirs = _rows_of(x_ptr, x_stride, next_slots, slots, top_k, BLOCK_M)
        unit = later
        later = latest
        block = next_block
        next_block = later_block
        turn += 1
    if GATHERS and before >= 0:
        _gathered(full, before, 0)
    tell(told, turn, 0)
