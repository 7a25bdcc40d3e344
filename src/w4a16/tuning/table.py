"""Reads a device's tuning rows; the first that covers the problem wins. A missing table is an error, not a guess."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Any

from ..device import Device
from ..errors import Unsupported
from ..problem import Problem
from .tiles import TILES

# Devices without a table of their own use that of their family; "any" holds rows that suit every device.
_FAMILY_TABLES = {"cpu": ("cpu",)}


@functools.cache
def _rows(table: str) -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(resources.files(__package__).joinpath(f"{table}.toml").read_text())


def tile_for(stem: str, problem: Problem, device: Device) -> Any:
    """The tile of kernel `stem`, None for a kernel without one.

    A row covers a problem when m, n and k are within its m_max, n_max and k_max. Raises Unsupported when none does.
    """
    if stem not in TILES:
        return None
    for table in (*_FAMILY_TABLES.get(device.family, ()), "any"):
        for row in _rows(table).get(stem, []):
            if all(row.get(f"{name}_max", size) >= size for name, size in _sizes(problem)):
                return TILES[stem](**row["tile"])
    raise Unsupported(f"no tuning row of {stem} covers m={problem.m} n={problem.n} k={problem.k} on {device.arch}.")


def _sizes(problem: Problem) -> tuple[tuple[str, int], ...]:
    return (("m", problem.m), ("n", problem.n), ("k", problem.k))
