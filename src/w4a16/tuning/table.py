"""Reads a device's tuning rows; the first that covers the problem wins. A missing row is an error, not a guess.

A device's rows are those of its product's table where it has one (h200.toml), then those of its architecture
(gfx1151.toml), of its family (gfx11.toml), and `any`. One row:

    [[triton_prefill]]
    m_max = 1024                      # conditions, all of which must hold; none: it covers everything
    tile = { block_m = 64, ... }      # the fields of the kernel's tile type
    why = "..."                       # the reason, and where the row comes from
    measured = "..."                  # date and place of the measurement, or "not measured yet"

    use = false                       # kept to be compared: production never takes it

Conditions: m_min m_max n_min n_max k_min k_max group_min group_max (inclusive), group, k_multiple_of,
k_per_n_min (K >= v N), n_per_k_min (N >= v K), n_above_k (N > K), act, has_zeros, arch (a list), nk (a list of [N, K]);
experts: load_min load_max (tokens x top_k / experts).
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from ..device import Device
from ..errors import Unsupported
from ..problem import Problem
from .sm90_decode_tiles import settled
from .sm90_tiles import Sm90DecodeTile, Sm90PrefillTile
from .sm90_waves import fastest
from .tiles import TILES

_CONDITIONS: dict[str, Callable[[Any, Problem, Device], bool]] = {
    "m_min": lambda v, p, d: p.m >= v,
    "m_max": lambda v, p, d: p.m <= v,
    "n_min": lambda v, p, d: p.n >= v,
    "n_max": lambda v, p, d: p.n <= v,
    "k_min": lambda v, p, d: p.k >= v,
    "k_max": lambda v, p, d: p.k <= v,
    "group_min": lambda v, p, d: p.group >= v,
    "group_max": lambda v, p, d: p.group <= v,
    "group": lambda v, p, d: p.group == v,
    "k_multiple_of": lambda v, p, d: p.k % v == 0,
    "k_per_n_min": lambda v, p, d: p.k >= v * p.n,
    "n_per_k_min": lambda v, p, d: p.n >= v * p.k,
    "n_above_k": lambda v, p, d: (p.n > p.k) == v,
    "act": lambda v, p, d: p.act == v,
    "has_zeros": lambda v, p, d: p.has_zeros == v,
    "arch": lambda v, p, d: d.arch in v,
    "load_min": lambda v, p, d: p.m * p.top_k >= v * p.experts,
    "load_max": lambda v, p, d: p.m * p.top_k <= v * p.experts,
    "nk": lambda v, p, d: [p.n, p.k] in v,
}
_REST = ("tile", "why", "measured", "use")


@dataclass(frozen=True, kw_only=True)
class TuningRow:
    """One row, and the table and place in it that it was read from (the first is 1)."""

    stem: str
    table: str
    place: int
    tile: Any
    why: str
    measured: str
    use: bool = True
    conditions: dict[str, Any] = field(default_factory=dict, hash=False)

    def with_tile(self, tile: Any) -> TuningRow:
        """The same row, what its tile leaves open settled."""
        return replace(self, tile=tile)

    def covers(self, problem: Problem, device: Device) -> bool:
        for name, wanted in self.conditions.items():
            if not _CONDITIONS[name](wanted, problem, device):
                return False
        return self.use


@functools.cache
def rows_of(table: str) -> tuple[TuningRow, ...]:
    """Every row of one table in its order, those for comparison included; empty when there is no such table."""
    source = resources.files(__package__).joinpath(f"{table}.toml")
    if not source.is_file():
        return ()
    parsed = tomllib.loads(source.read_text())
    return tuple(
        TuningRow(
            stem=stem,
            table=table,
            place=place,
            tile=TILES[stem](**row["tile"]),
            why=row["why"],
            measured=row["measured"],
            use=row.get("use", True),
            conditions={name: value for name, value in row.items() if name not in _REST},
        )
        for stem, rows in parsed.items()
        for place, row in enumerate(rows, 1)
    )


@functools.cache
def device_rows(stem: str, device: Device) -> tuple[TuningRow, ...]:
    """The rows of kernel `stem` that a device reads, in the order it reads them."""
    tables = dict.fromkeys((device.name, device.arch, device.family, "any"))
    return tuple(row for table in tables for row in rows_of(table) if row.stem == stem)


def covering_row(stem: str, problem: Problem, device: Device) -> TuningRow | None:
    """The first row of kernel `stem` that covers the problem, None when there is none; for Hopper's prefill the row
    that a model of its time finds fastest. A split of K that the row leaves open is settled here.
    """
    rows = device_rows(stem, device)
    first = next((row for row in rows if row.covers(problem, device)), None)
    if first is not None and isinstance(first.tile, Sm90DecodeTile):
        return first.with_tile(as_run(first.tile, problem, device))
    if first is None or not isinstance(first.tile, Sm90PrefillTile) or first.tile.split_k:
        return first
    return fastest(rows, problem, device)


def as_run(tile: Any, problem: Problem, device: Device) -> Any:
    """The tile of a row as the kernel gets it: in Hopper's decode what follows from the problem is settled."""
    return settled(tile, problem, device) if isinstance(tile, Sm90DecodeTile) else tile


def row_for(stem: str, problem: Problem, device: Device) -> TuningRow:
    """The row that gives kernel `stem` its tile. Raises Unsupported when none covers the problem."""
    row = covering_row(stem, problem, device)
    if row is not None:
        return row
    raise Unsupported(
        f"no tuning row of {stem} covers m={problem.m} n={problem.n} k={problem.k} group={problem.group} on "
        f"{device.arch}. Add one to tuning/{device.arch}.toml or tuning/{device.family}.toml."
    )


def tile_for(stem: str, problem: Problem, device: Device) -> Any:
    """The tile of kernel `stem`, None for a kernel without one. Raises Unsupported when no row covers the problem."""
    return row_for(stem, problem, device).tile if stem in TILES else None
