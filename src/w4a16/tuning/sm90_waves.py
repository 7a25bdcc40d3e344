"""Which tile of Hopper's prefill serves a problem: the one that a model of its time finds fastest, or two.

Programs of one tile may leave most of the last wave's SMs without work. Then the rows of W, or of x, that fill whole
waves get a launch of their own, and the tile that is fastest for those left another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..device import Device
from ..layouts.sm90 import TILE
from ..problem import Problem
from .sm90_tiles import WAVE_US, cdiv, prefill_choices, sm90_us

if TYPE_CHECKING:
    from .table import TuningRow

# LAUNCH_US: what two launches take longer than predicted for each, the median of 16 (docs/measured.md, #7). GAIN:
# predicted, or one launch it is.
LAUNCH_US, GAIN = 4.0, 0.97


def fastest(rows: Sequence[TuningRow], problem: Problem, device: Device) -> TuningRow | None:
    """Of the rows that cover the problem: its tile settled, with a second tile where that is faster."""
    found = _alone(rows, problem, device)
    if found is None:
        return None
    limit, best = found[0] * GAIN, found[1]
    for least, row, side, size in sorted(_whole_waves(rows, problem, device, limit), key=lambda choice: choice[0]):
        if least >= limit:
            break
        tile = replace(row.tile, split_k=1, **{f"first_{side}": size})
        us = LAUNCH_US + sm90_us(tile, _sized(problem, side, size), device)
        rest = _alone(rows, _sized(problem, side, getattr(problem, side) - size), device)
        if rest is not None and us + rest[0] < limit:
            limit, best = us + rest[0], row.with_tile(replace(tile, rest=rest[1].tile))
    return best


def _sized(problem: Problem, side: str, size: int) -> Problem:
    return replace(problem, n=size) if side == "n" else replace(problem, m=size)


def _alone(rows: Sequence[TuningRow], problem: Problem, device: Device) -> tuple[float, TuningRow] | None:
    """The fastest in one launch, and its predicted microseconds."""
    choices = [
        (sm90_us(tile, problem, device), row, tile)
        for row in rows
        if row.covers(problem, device)
        for tile in prefill_choices(row.tile, problem, device)
    ]
    us, row, tile = min(choices, key=lambda choice: choice[0], default=(0.0, None, None))
    return None if row is None else (us, row.with_tile(tile))


def _whole_waves(
    rows: Sequence[TuningRow], problem: Problem, device: Device, limit: float
) -> Iterator[tuple[float, TuningRow, str, int]]:
    """Rows whose tile may gain by whole waves of its own: the least that both launches can take, under the limit, and
    how much of which side, n or m, fills these waves. Called for each new M: nothing is built here."""
    rows = [row for row in rows if row.tile.residents == 1 and row.covers(problem, device)]
    quickest = min((row.tile.step_ns / (row.tile.block_m * row.tile.warpgroups) for row in rows), default=0.0)
    steps = cdiv(problem.k, TILE)
    for row in rows:
        block_m, block_n = row.tile.block_m, TILE * row.tile.warpgroups
        blocks_m, blocks_n = cdiv(problem.m, block_m), cdiv(problem.n, block_n)
        whole = blocks_m * blocks_n // device.compute_units * device.compute_units
        first_n, first_m = whole // blocks_m * block_n, whole // blocks_n * block_m
        for side, size, blocks, left in (
            ("n", first_n, whole // blocks_m * blocks_m, (problem.n - first_n) * problem.m),
            ("m", first_m, whole // blocks_n * blocks_n, (problem.m - first_m) * problem.n),
        ):
            waves = cdiv(blocks, device.compute_units)
            us = LAUNCH_US + (waves + 1) * WAVE_US + 1e-3 * waves * steps * row.tile.step_ns
            least = us + 1e-3 * quickest * steps * left / (TILE * device.compute_units)
            if size and left > 0 and least < limit:
                yield least, row, side, size
