"""The producer of sm90_prefill: one warp that copies tiles of x and of W by TMA into the ring."""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, unreachable"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..compat import to_shared
from ._add_parts import RASTER_M
from ._sm90 import cluster_barrier, wait_for_the_kernel_before


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


@gluon.constexpr_function
def tiles_a_box(group, tiles):
    """How many of a step's tiles share one box of scales: all of a group, two of smaller ones."""
    return tiles if group % (64 * tiles) == 0 or (tiles == 2 and 128 % group == 0) else 1


@gluon.constexpr_function
def groups_a_box(group, tiles):
    """Groups of one box of scales."""
    return max(64 * tiles_a_box(group, tiles) // group, 1)


@gluon.jit
def _ask_weight(
    codes_desc, scales_desc, zeros_desc, codes, scales, zeros, full, slot, block_n, tile, tiles,
    GROUP: gl.constexpr, TILES: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    SHARED: gl.constexpr = tiles_a_box(GROUP, TILES)
    for w in gl.static_range(WARPGROUPS):
        row = block_n * WARPGROUPS + w
        at = slot * WARPGROUPS + w
        to_shared(codes_desc, [(row * tiles + tile) * 16, 0], full.index(slot), codes.index(at))
        for i in gl.static_range(0, TILES, SHARED):
            group, box = (tile + i) * 64 // GROUP, (at * TILES + i) // SHARED
            to_shared(scales_desc, [group, row * 64], full.index(slot), scales.index(box))
            if zeros_desc is not None:
                to_shared(zeros_desc, [group, row * 64], full.index(slot), zeros.index(box))


@gluon.constexpr_function
def product_rows(block_m, j):
    """Rows of x in product j of a block, each a power of two and fewer than in the one before; 0: there is none."""
    rows = int(block_m)
    for _ in range(j):
        rows -= 1 << rows.bit_length() >> 1
    return 1 << rows.bit_length() >> 1


@gluon.constexpr_function
def rows_before(block_m, j):
    """Rows of x in the products before product j."""
    rows = int(block_m)
    for _ in range(j):
        rows -= 1 << rows.bit_length() >> 1
    return int(block_m) - rows


@gluon.constexpr_function
def box_rows(block_m):
    """Rows of the boxes that copy the rest of a block of x: rows past M cost TMA more than rows of x."""
    return max(min((1 << int(block_m).bit_length() >> 1) // 4, int(block_m) & -int(block_m)), 8)


@gluon.jit
def _expect(full, slot, rows, WEIGHT: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    """A step's tiles of weights and of x, of which so many rows are left."""
    BOX: gl.constexpr = box_rows(BLOCK_M)
    if rows >= BLOCK_M:
        mbarrier.expect(full.index(slot), WEIGHT + BLOCK_M * TILES * 128)
    else:
        boxes = gl.cdiv(rows, BOX)
        for i in gl.static_range(1, BLOCK_M // BOX + 1):  # the count of bytes is a constant
            mbarrier.expect(full.index(slot), WEIGHT + i * BOX * TILES * 128, boxes == i)


@gluon.jit
def _ask_x(x_descs, box_desc, full, xs, slot, m, tile, rows, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    """Tiles of x, of which so many rows are left; past them a tile keeps what it held, for columns not stored."""
    BOX: gl.constexpr = box_rows(BLOCK_M)
    for j in gl.static_range(len(xs)):
        at = m * BLOCK_M + rows_before(BLOCK_M, j)
        left = rows - rows_before(BLOCK_M, j)
        if left >= product_rows(BLOCK_M, j):
            for i in gl.static_range(TILES):
                to_shared(x_descs[j], [at, (tile + i) * 64], full.index(slot), xs[j].index(slot * TILES + i))
        else:
            for i in gl.static_range(TILES):
                for b in gl.static_range(product_rows(BLOCK_M, j) // BOX):
                    if b * BOX < left:
                        box = xs[j].index(slot * TILES + i).slice(b * BOX, BOX, 0)
                        to_shared(box_desc, [at + b * BOX, (tile + i) * 64], full.index(slot), box)


@gluon.jit
def after(slot, phase, steps, RING: gl.constexpr):
    """Place in the ring and parity of its turn, so many steps on: at most to the ring's end."""
    over = (slot + steps == RING).to(gl.int32)
    return slot + steps - over * RING, phase ^ over


@gluon.jit
def produce(
    x_descs, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    RING: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    xs, codes, scales, full, empty, _ = ring
    M, N, K = sizes
    TILES: gl.constexpr = BLOCK_K // 64
    ROWS: gl.constexpr = 128 if zeros_desc is None else 256  # bytes of scales, and of zero points
    BOXES: gl.constexpr = TILES // tiles_a_box(GROUP, TILES)
    WEIGHT: gl.constexpr = WARPGROUPS * (2048 * TILES + BOXES * groups_a_box(GROUP, TILES) * ROWS)  # bytes a step
    tiles = gl.cdiv(K, 64)
    # The weight does not depend on the kernel before: its first tiles are asked for while that still runs.
    m, n, first, last = unit_of(gl.program_id(0), M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
    early = min(RING, (last - first) // TILES)
    rows = M - m * BLOCK_M
    for i in range(early):
        _expect(full, i, rows, WEIGHT, BLOCK_M, TILES)
        _ask_weight(
            codes_desc, scales_desc, zeros_desc, codes, scales, zeros, full, i, n, first + i * TILES, tiles,
            GROUP, TILES, WARPGROUPS,
        )  # fmt: skip
    wait_for_the_kernel_before()
    for i in range(early):
        _ask_x(x_descs, box_desc, full, xs, i, m, first + i * TILES, rows, BLOCK_M, TILES)
    slot, phase = after(0, 0, early, RING)
    for unit in range(gl.program_id(0), units_of(M, N, BLOCK_M, WARPGROUPS, SPLIT), gl.num_programs(0)):
        m, n, first, last = unit_of(unit, M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
        rows = M - m * BLOCK_M
        first += early * TILES * (unit == gl.program_id(0)).to(gl.int32)
        for tile in range(first, last, TILES):
            mbarrier.wait(empty.index(slot), phase ^ 1)
            _expect(full, slot, rows, WEIGHT, BLOCK_M, TILES)
            _ask_weight(
                codes_desc, scales_desc, zeros_desc, codes, scales, zeros, full, slot, n, tile, tiles,
                GROUP, TILES, WARPGROUPS,
            )  # fmt: skip
            _ask_x(x_descs, box_desc, full, xs, slot, m, tile, rows, BLOCK_M, TILES)
            slot, phase = after(slot, phase, 1, RING)
    if PAIRED:
        cluster_barrier()


@gluon.jit
def stand_by(M):
    """For the warps that fill up the producer's warpgroup: a cluster waits for all."""
    cluster_barrier()
