"""The producer of sm90_moe: tiles of W by TMA, rows of x gathered, or by TMA where they stand in order."""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated, unreachable"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..compat import copy_to_shared, reinterpreted, to_shared
from ._sm90 import let_the_next_kernel_start, wait_for_the_kernel_before

THREADS = gl.constexpr(128)  # each arrives at a stage when its part of a gather has
WARPGROUPS = gl.constexpr(2)  # of two tiles of 64 rows of W each
BOX_ROWS = gl.constexpr(32)  # of x and out: a block takes as many boxes as it has rows


@gluon.constexpr_function
def _x_layout():
    """Of rows of x on their way to shared memory by a warpgroup: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def marks_of(sorted_ptr, unit, units, units_n, BLOCK_M: gl.constexpr):
    """The first slot of each box but the first, of the block of a unit: padding where it has no more rows than that."""
    first = sorted_ptr + gl.minimum(unit, gl.maximum(units, 1) - 1) // units_n * BLOCK_M
    marks = ()
    for i in gl.static_range(1, BLOCK_M // BOX_ROWS):
        marks = marks + (gl.load(first + i * BOX_ROWS),)
    return marks


@gluon.jit
def boxes_of(marks, slots, BLOCK_M: gl.constexpr):
    """The boxes of rows that have slots."""
    boxes = 1
    for i in gl.static_range(BLOCK_M // BOX_ROWS - 1):
        boxes += (marks[i] < slots).to(gl.int32)
    return boxes


@gluon.jit
def _slots(sorted_ptr, unit, units, units_n, BLOCK_M: gl.constexpr):
    """The slots of the block of a unit, box by box."""
    first = sorted_ptr + gl.minimum(unit, gl.maximum(units, 1) - 1) // units_n * BLOCK_M
    lane = gl.arange(0, BOX_ROWS, gl.SliceLayout(1, _x_layout()))
    slots = ()
    for i in gl.static_range(BLOCK_M // BOX_ROWS):
        slots = slots + (gl.load(first + i * BOX_ROWS + lane),)
    return slots


@gluon.jit
def _gather(x_ptr, x_stride, xs, slot, slots, step, K, TOP_K: gl.constexpr):
    """Starts copying 64 columns of the rows of x that some slots stand for; zeros for padding and past the end of K."""
    k = gl.expand_dims(step * 64 + gl.arange(0, 64, gl.SliceLayout(0, _x_layout())), 0)
    at = x_ptr + gl.expand_dims((slot // TOP_K).to(gl.int64) * x_stride, 1) + k
    copy_to_shared(xs, at, mask=(gl.expand_dims(slot, 1) < slots) & (k < K))


@gluon.jit
def _ask_x(x_desc, xs, full, row, boxes, step, BLOCK_M: gl.constexpr):
    """Starts copying 64 columns of some boxes of x, from `row` on."""
    for i in gl.static_range(BLOCK_M // BOX_ROWS):
        if i < boxes:
            to_shared(x_desc, [row + i * BOX_ROWS, step * 64], full, xs.slice(i * BOX_ROWS, BOX_ROWS, 0))


@gluon.jit
def _ask_weight(
    w, ring, zeros, expert, n, step, at, boxes, sizes,
    GROUP: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr, GATHERS: gl.constexpr,
):  # fmt: skip
    """Starts copying the tiles of W of one step into stage `at`, and says how many bytes will come by TMA."""
    codes_desc, scales_desc, zeros_desc = w
    _, codes, scales, full, _ = ring
    _, tiles_n, groups = sizes
    SCALED: gl.constexpr = codes_desc.block_type.nbytes + scales_desc.block_type.nbytes
    BYTES: gl.constexpr = 2 * (SCALED if zeros_desc is None else SCALED + zeros_desc.block_type.nbytes)
    if GATHERS:
        mbarrier.expect(full.index(at), BYTES)
    else:
        for i in gl.static_range(1, BLOCK_M // BOX_ROWS + 1):
            mbarrier.expect(full.index(at), BYTES + i * BOX_ROWS * 128, pred=boxes == i)
    first = n * WARPGROUPS if GATED else n * (2 * WARPGROUPS)
    second = first + (tiles_n // 2 if GATED else WARPGROUPS)
    group = expert * groups + step * 64 // GROUP
    for i in gl.static_range(2):
        row = first if i == 0 else second
        to = at * 2 + i
        box = reinterpreted(codes.index(to), gl.int32, codes_desc.block_shape, codes_desc.layout)
        to_shared(codes_desc, [expert * tiles_n + row, step * 16, 0], full.index(at), box)
        to_shared(scales_desc, [group, row * 64], full.index(at), scales.index(to))
        if zeros_desc is not None:
            to_shared(zeros_desc, [group, row * 64], full.index(at), zeros.index(to))


@gluon.jit
def produce(
    x, w, ring, zeros, routing, sizes,
    GROUP: gl.constexpr, GATED: gl.constexpr, TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the ring, unit after unit. What a unit needs of the route is asked for a unit ahead."""
    xs, _, _, full, empty = ring
    x_ptr, x_stride, x_desc = x
    sorted_ptr, expert_ptr, used_ptr, slots = routing
    K, tiles_n, _ = sizes
    GATHERS: gl.constexpr = x_ptr is not None
    steps = gl.cdiv(K, 64)
    units_n = gl.cdiv(gl.cdiv(tiles_n, 2), WARPGROUPS)
    if GATHERS:
        wait_for_the_kernel_before()
        let_the_next_kernel_start()
    units = gl.load(used_ptr) // BLOCK_M * units_n
    start = gl.program_id(0)
    expert = gl.load(expert_ptr + gl.minimum(start, gl.maximum(units, 1) - 1) // units_n)
    marks = marks_of(sorted_ptr, start, units, units_n, BLOCK_M)
    if GATHERS:
        early = 0
        slot = _slots(sorted_ptr, start, units, units_n, BLOCK_M)
    else:
        # Neither the weight nor the route is of the kernel before: the first tiles are asked for while that still runs.
        early = gl.minimum(STAGES, steps) * (start < units).to(gl.int32)
        boxes = boxes_of(marks, slots, BLOCK_M)
        for step in range(early):
            _ask_weight(
                w, ring, zeros, expert, start % units_n, step, step, boxes, sizes,
                GROUP, GATED, BLOCK_M, GATHERS,
            )  # fmt: skip
        wait_for_the_kernel_before()
        let_the_next_kernel_start()
        for step in range(early):
            _ask_x(x_desc, xs.index(step), full.index(step), start // units_n * BLOCK_M, boxes, step, BLOCK_M)
    done = early
    for unit in range(start, units, gl.num_programs(0)):
        boxes = boxes_of(marks, slots, BLOCK_M)
        later = unit + gl.num_programs(0)
        next_expert = gl.load(expert_ptr + gl.minimum(later, units - 1) // units_n)
        next_marks = marks_of(sorted_ptr, later, units, units_n, BLOCK_M)
        if GATHERS:
            next_slot = _slots(sorted_ptr, later, units, units_n, BLOCK_M)
        for step in range(early * (unit == start).to(gl.int32), steps):
            at = done % STAGES
            mbarrier.wait(empty.index(at), (done // STAGES & 1) ^ 1)
            _ask_weight(
                w, ring, zeros, expert, unit % units_n, step, at, boxes, sizes,
                GROUP, GATED, BLOCK_M, GATHERS,
            )  # fmt: skip
            if GATHERS:
                for i in gl.static_range(BLOCK_M // BOX_ROWS):
                    if i < boxes:
                        to = xs.index(at).slice(i * BOX_ROWS, BOX_ROWS, 0)
                        _gather(x_ptr, x_stride, to, slot[i], slots, step, K, TOP_K)
                async_copy.mbarrier_arrive(full.index(at), increment_count=False)
            else:
                _ask_x(x_desc, xs.index(at), full.index(at), unit // units_n * BLOCK_M, boxes, step, BLOCK_M)
            done += 1
        expert = next_expert
        marks = next_marks
        if GATHERS:
            slot = next_slot
