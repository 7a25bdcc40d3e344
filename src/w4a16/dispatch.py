"""Which kernel serves a problem: the first row of dispatch_table.TABLE with nothing against it.

Rows are compared inside the operator, at every call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import env
from .device import Device, current_device
from .dispatch_table import TABLE, Row
from .errors import Unsupported
from .forks import one_thread_in_children
from .problem import ACT_NAMES, Problem
from .tuning.table import tile_for
from .tuning.tiles import why_illegal


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The winner, its tile and the layout its weight is packed in."""

    row: Row
    tile: Any
    layout: str


def layout_for(problem: Problem, device: Device) -> str:
    """The layout a weight is packed in: that of the first kernel that decodes it (its row count plays no part).

    Experts take it where a kernel of theirs reads it, else the layout of the first that serves them. A kernel that
    W4A16_KERNEL forces comes first.
    """
    linear = replace(problem, m=1, experts=0, top_k=0)
    preferred = _first_layout(linear, device)
    if not problem.experts:
        if preferred is None:
            raise Unsupported(_refusal(problem, device, None))
        return preferred
    rows = [row for row in _forced_first() if row.unsupported(problem, device) is None]
    if not rows:
        raise Unsupported(_refusal(problem, device, None))
    return preferred if preferred in rows[0].layouts else rows[0].layouts[0]


def _first_layout(problem: Problem, device: Device) -> str | None:
    return next((row.layouts[0] for row in _forced_first() if row.unsupported(problem, device) is None), None)


def _forced_first() -> list[Row]:
    return sorted(TABLE, key=lambda row: row.stem != env.FORCED_KERNEL)


@functools.lru_cache(maxsize=1 << 16)
def choose(problem: Problem, device: Device, layout: str | None = None) -> Choice:
    """The kernel for `problem` on `device` over a weight packed in `layout` (None: as `layout_for` would pack it).

    Raises Unsupported with every kernel's sentence when none serves it, or when the forced one (W4A16_KERNEL) cannot.
    """
    packed = layout or layout_for(problem, device)
    for row in TABLE:
        if _sentence(row, problem, device, packed) is None:
            return Choice(row=row, tile=_legal_tile(row.stem, problem, device), layout=packed)
    raise Unsupported(_refusal(problem, device, packed))


def _legal_tile(stem: str, problem: Problem, device: Device) -> Any:
    """The tile of a tuning row; Unsupported when the hardware could not run it."""
    tile = tile_for(stem, problem, device)
    why = None if tile is None else why_illegal(stem, tile, problem, device)
    if why:
        raise Unsupported(f"{stem} {tile} on {device.arch}: {why}. Correct the tuning row.")
    return tile


def _sentence(row: Row, problem: Problem, device: Device, layout: str | None) -> str | None:
    """Why `row` does not serve the problem, the forced kernel included; None when it does."""
    sentence = row.unsupported(problem, device, layout)
    forced = env.FORCED_KERNEL
    if sentence is None and forced not in (None, row.stem) and _op_of(forced) in (None, problem.op):
        return f"W4A16_KERNEL forces {forced}"
    return sentence


def _op_of(stem: str | None) -> str | None:
    """The op a kernel serves: forcing a linear kernel leaves expert layers alone."""
    return next((row.op for row in TABLE if row.stem == stem), None)


def _refusal(problem: Problem, device: Device, layout: str | None) -> str:
    """The message of Unsupported: the problem, one line a kernel, what to do."""
    lines = [
        f"no kernel for {problem.op} m={problem.m} n={problem.n} k={problem.k} group={problem.group}"
        f" act={problem.act} on {device.arch}"
    ]
    lines += [f"  {row.stem:<14} {_sentence(row, problem, device, layout)}" for row in TABLE]
    lines.append("Run `w4a16 explain` with these numbers, or load the weight with device='cpu'.")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One kernel's answer to a problem."""

    stem: str
    does: str
    answer: str
    wins: bool


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Every kernel's answer, and the choice; None when no kernel serves the problem."""

    lines: tuple[Line, ...]
    choice: Choice | None


def explanation(problem: Problem, device: Device) -> Explanation:
    """Every row's answer to `problem` on `device`, in the table's order."""
    try:
        choice = choose(problem, device)
        layout: str | None = choice.layout
    except Unsupported:
        choice, layout = None, None
    lines = []
    for row in TABLE:
        wins = choice is not None and row is choice.row
        answer = "serves it" if wins else _sentence(row, problem, device, layout) or "could, but an earlier row wins"
        lines.append(Line(stem=row.stem, does=row.does, answer=answer, wins=wins))
    return Explanation(lines=tuple(lines), choice=choice)


@functools.cache
def launcher(stem: str) -> Callable[..., None]:
    """The launcher of a kernel, imported at its first use: `import w4a16` needs neither driver nor compiler."""
    one_thread_in_children()
    module = importlib.import_module(f".kernels.{stem}", __package__)
    found: Callable[..., None] = getattr(module, stem)
    return found


@functools.cache
def plan_of(stem: str) -> Callable[..., Any] | None:
    """A kernel's launches as data, where it has any."""
    plan: Callable[..., Any] | None = getattr(importlib.import_module(f".kernels.{stem}", __package__), "plan", None)
    return plan


@dataclass(frozen=True, kw_only=True)
class Served:
    """What one call needs of dispatch: who serves it, with which tile. plan: its launches as data, where it has any."""

    problem: Problem
    stem: str
    launch: Callable[..., None]
    tile: Any
    plan: Callable[..., Any] | None = None


@functools.lru_cache(maxsize=1 << 16)
def serve_linear(
    where: torch.device,
    layout: str,
    m: int,
    n: int,
    k: int,
    group: int,
    act: torch.dtype,
    has_zeros: bool,
    resident: bool = False,
) -> Served:
    """`choose` from a call's bare facts, remembered by them: one lookup on the path of every call."""
    problem = Problem(m=m, n=n, k=k, group=group, act=ACT_NAMES[act], has_zeros=has_zeros, resident=resident)
    choice = choose(problem, current_device(where), layout)
    stem, launch = choice.row.stem, launcher(choice.row.stem)
    return Served(problem=problem, stem=stem, launch=launch, tile=choice.tile, plan=plan_of(stem))


_record: ContextVar[list[tuple[str, Problem]] | None] = ContextVar("w4a16_record", default=None)


@contextmanager
def record() -> Iterator[list[tuple[str, Problem]]]:
    """Collects (stem, problem) of every call that runs inside the `with`, in order."""
    served: list[tuple[str, Problem]] = []
    token = _record.set(served)
    try:
        yield served
    finally:
        _record.reset(token)


def note(stem: str, problem: Problem) -> None:
    """Adds one call to the running record, if any."""
    served = _record.get()
    if served is not None:
        served.append((stem, problem))
