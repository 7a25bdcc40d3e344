"""Which kernels production can launch on a device: one Problem for each tile that tuning can give."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..device import Device
from ..dispatch_table import TABLE
from ..layouts import SKINNY, SM90
from ..problem import Problem
from ..tuning.table import TuningRow, device_rows, row_for
from ..tuning.tiles import TILES
from .stems import launches

ROWS = (2048, 4096, 1024, 512, 832, 576, 400, 256, 128, 96, 64, 32, 16, 5, 2, 1)
GROUPS = (128, 64, 32, 0)  # 0: channel-wise
ACTS = ("bf16", "fp16")
Place = tuple[str, str, int]

# (N, K) of served models' layers, and (N, K, experts, top_k) of their expert layers; the first shapes are the largest.
LINEAR = (
    (24576, 4096),
    (4096, 12288),
    (6144, 4096),
    (4096, 4096),
    (37888, 3584),
    (3584, 18944),
    (19456, 2560),
    (2560, 9728),
    (6144, 2560),
    (2560, 4096),
    (32768, 2048),
    (2048, 16384),
    (6144, 2048),
    (16384, 2048),
    (2048, 8192),
    (2048, 2048),
    (1024, 2048),
    (512, 8192),
    (9728, 896),
)
EXPERTS = ((1024, 2048, 256, 8), (1536, 2048, 128, 8), (28672, 4096, 8, 2), (1024, 512, 32, 4))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tuning row, and a problem that production serves with it."""

    row: TuningRow
    problem: Problem


def problems(op: str) -> Iterator[Problem]:
    """The problems that stand for production, those most often met first."""
    shapes = [(*shape, 0, 0) for shape in LINEAR] if op == "linear" else EXPERTS
    for group, m, (n, k, experts, top_k), act, zeros in itertools.product(GROUPS, ROWS, shapes, ACTS, (True, False)):
        yield Problem(m=m, n=n, k=k, group=group or k, act=act, has_zeros=zeros, experts=experts, top_k=top_k)


def compiled_stems() -> list[str]:
    """The kernels of the dispatch table that Triton compiles: those that plan their launches."""
    tiled = dict.fromkeys(row.stem for row in TABLE if row.layouts[0] in (SKINNY, SM90) and row.stem in TILES)
    return [stem for stem in tiled if hasattr(importlib.import_module(f"..kernels.{stem}", __package__), "plan")]


def cases(device: Device) -> list[Case]:
    """One case for each code that the tiles of tuning give, with zero points where a row allows."""
    distinct: dict[tuple[Any, ...], Case] = {}
    for case in _reached(device):
        row, problem = case.row, case.problem
        sizes = (row.stem, row.tile, problem.act, problem.m, _group(case))
        distinct.setdefault(sizes, case)  # a plan takes milliseconds
    found: dict[tuple[Any, ...], Case] = {}
    for case in distinct.values():
        found.setdefault(_code(case, device), case)
    return list(found.values())


def unreached(devices: Iterable[Device]) -> list[TuningRow]:
    """The rows for production that none of the problems above gets on any of these devices."""
    everywhere = list(devices)
    reached = {place_of(case.row) for device in everywhere for case in _reached(device)}
    rows = {
        place_of(row): row for device in everywhere for stem in compiled_stems() for row in device_rows(stem, device)
    }
    return [row for place, row in rows.items() if row.use and place not in reached]


def place_of(row: TuningRow) -> Place:
    """Which row of which table this is."""
    return row.stem, row.table, row.place


def _reached(device: Device) -> Iterator[Case]:
    kernels = {row.stem: row for row in TABLE}
    for stem in compiled_stems():
        for problem in problems(kernels[stem].op):
            if kernels[stem].unsupported(problem, device) is None:
                yield from _apart(row_for(stem, problem, device), problem, device)


def _apart(row: TuningRow, problem: Problem, device: Device) -> Iterator[Case]:
    """The case, or one for each of a problem's two launches, whose code is that of problems with one."""
    tile = row.tile
    if getattr(tile, "rest", None) is None:
        yield Case(row=row, problem=problem)
        return
    m, n = tile.first_m, tile.first_n
    first = replace(problem, m=m or problem.m, n=n or problem.n)
    yield Case(row=row.with_tile(replace(tile, first_m=0, first_n=0, rest=None)), problem=first)
    open_tile = replace(tile.rest, split_k=0, paired=False)
    other = next(other for other in device_rows(row.stem, device) if other.tile == open_tile)
    yield Case(row=other.with_tile(tile.rest), problem=replace(problem, m=problem.m - m, n=problem.n - n))


def _code(case: Case, device: Device) -> tuple[Any, ...]:
    """What decides a kernel's code, but for most groups and the experts: the tile and what the plan makes of M."""
    row, problem = case.row, case.problem
    planned = launches(row.stem, problem, device, row.tile)
    if row.stem == "sm90_moe":  # routing depends on the number of slots alone
        planned = tuple(launch for launch in planned if launch.fn.__name__.startswith("_sm90"))
    constants = [{k: v for k, v in launch.constants.items() if k not in _BY_SIZES} for launch in planned]
    tile, act = row.tile, "bf16" if row.stem == "sm90_moe" else problem.act
    if row.stem.startswith("sm90_") and not problem.experts:
        # two parts of K stand for more, and bf16 for fp16, which differs in constants
        tile, act = replace(tile, split_k=min(tile.split_k, 2), residents=1), "bf16"
        constants = [{**sizes, "SPLIT": min(sizes["SPLIT"], 2)} for sizes in constants]
    return row.stem, tile, act, _group(case), repr(constants)


def _group(case: Case) -> int | None:
    """The columns of a group, 0 for all of K, where they decide whether registers last: in sm90_decode's programs that
    ask for most of the weight at once."""
    tile, problem = case.row.tile, case.problem
    whole = case.row.stem == "sm90_decode" and tile.split_k == tile.parts == 1
    return problem.group % problem.k if whole else None


_BY_SIZES = ("GROUP", "BLOCK_K", "UNROLL_K", "EXPERTS", "TOP_K", "TRIPS", "SHARE", "SLABS", "SPARE")
