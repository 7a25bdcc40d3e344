"""The producer of sm90_prefill: one warp that copies tiles of x and of W by TMA into the ring."""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, unreachable"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..compat import to_shared
from ._add_parts import RASTER_M
from ._sm90 import groups_a_tile, wait_for_the_kernel_before


@gluon.jit
def unit_of(
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
def units_of(M, N, BLOCK_M: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr):
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
def produce(
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
    m, n, first, last = unit_of(gl.program_id(0), M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
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
    for unit in range(gl.program_id(0), units_of(M, N, BLOCK_M, WARPGROUPS, SPLIT), gl.num_programs(0)):
        m, n, first, last = unit_of(unit, M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
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
