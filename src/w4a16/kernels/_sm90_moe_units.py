"""The units of work of sm90_moe, as the producer names them: a block of the route times the tiles of a program."""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._sm90_moe_consumer import scales_sums, unit_of_pairs
from ._sm90_moe_producer import BOX_ROWS, PAIRS, THREE_BOXES, columns_of, hear
from ._sm90_moe_tile import unit_of_tile


@gluon.jit
def consume(
    W: gl.constexpr, out, shares_ptr, ring, zeros, told, outs, handing, routing, sizes,
    GROUP: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr,
    WARPGROUPS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's part of every unit."""
    K, tiles_n, _ = sizes
    steps = gl.cdiv(K, 64 * TILES)
    units_n = gl.cdiv(tiles_n, 2 * PAIRS)
    WIDTH: gl.constexpr = 64 * PAIRS if GATED else 128 * PAIRS
    # 96 columns make ptxas of Triton 3.9 spill where a warpgroup has two tiles
    TIGHT: gl.constexpr = WARPGROUPS == PAIRS and not scales_sums(GROUP) and zeros is not None
    done, turn, word = 0, 0, 1
    while word != 0:
        word = hear(told, turn)  # the last is 0, of no width
        unit, width = word // 8, word % 8
        if TIGHT:
            width += (width == THREE_BOXES).to(gl.int32)
        row, column = unit // units_n * BLOCK_M, unit % units_n * WIDTH
        own_column = column + W * 64
        for i in gl.static_range(1, BLOCK_M // BOX_ROWS + 2):
            if not (TIGHT and i == THREE_BOXES) and width == i:
                if WARPGROUPS == PAIRS:
                    unit_of_pairs(
                        W, out, shares_ptr, ring, zeros, outs, routing, done, steps, row, own_column,
                        GROUP, GATED, ACTIVATION, columns_of(i), TILES, STAGES,
                    )  # fmt: skip
                else:
                    unit_of_tile(
                        W, out, shares_ptr, ring, zeros, outs, handing, routing, done, turn, steps, row, column,
                        GROUP, GATED, ACTIVATION, columns_of(i), TILES, STAGES,
                    )  # fmt: skip
        done += steps
        turn += 1
