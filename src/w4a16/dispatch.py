"""Which kernel serves a problem: one ordered table, as data, and the choice made from it.

The first row of TABLE with nothing against the problem wins. Rows are compared inside the operator, at every call.
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
from .device import Device, current_device, installed
from .errors import Unsupported
from .forks import one_thread_in_children
from .layouts import EXLLAMA, INT4PACK, LAYOUTS, SKINNY, SM90
from .layouts.sm90 import sm90_group
from .problem import ACT_NAMES, Problem
from .tuning.gfx11_tiles import GROUPS as GFX11_GROUPS
from .tuning.table import TuningRow, covering_row, tile_for
from .tuning.tiles import why_illegal

_EXTRAS = {"numba": "'w4a16[cpu]'"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel and where it runs. `also` returns a sentence for a limit that no other field can say, or None."""

    stem: str
    does: str
    op: str = "linear"
    layouts: tuple[str, ...] = (EXLLAMA,)
    arch: tuple[str, ...] | None = None
    m: tuple[int, int | None] = (1, None)
    act: tuple[str, ...] | None = None
    needs: str | None = None
    also: Callable[[Problem, Device], str | None] | None = None

    def unsupported(self, problem: Problem, device: Device, layout: str | None = None) -> str | None:
        """None when this kernel serves the problem, else one sentence that says why not."""
        low, high = self.m
        if problem.op != self.op:
            return f"serves {self.op} problems, not {problem.op}"
        if self.arch is not None and not device.arch.startswith(self.arch):
            return f"runs on {' or '.join(self.arch)}, not on {device.arch}"
        if self.act is not None and problem.act not in self.act:
            return f"activations must be {' or '.join(self.act)}, not {problem.act}"
        if self.needs is not None and not installed(self.needs):
            return f"needs the package {self.needs}: pip install {_EXTRAS.get(self.needs, self.needs)}"
        if layout is not None and layout not in self.layouts:
            return f"reads layout {' or '.join(self.layouts)}; this weight is packed as {layout}"
        if problem.m < low or (high is not None and problem.m > high):
            return f"m must be {low} to {high}, not {problem.m}" if high else f"m must be at least {low}"
        return self.also(problem, device) if self.also else None


def _int4pack_group(problem: Problem, device: Device) -> str | None:
    return None if problem.group % 32 == 0 else f"group must be a multiple of 32, not {problem.group}"


def _whole_blocks(problem: Problem, device: Device) -> str | None:
    return None if problem.group % 16 == 0 else f"group must be a multiple of 16, not {problem.group}"


def _copy_pays(problem: Problem, device: Device) -> str | None:
    if not problem.resident:
        return "the weight has no dense copy (docs/dense.md)"
    return _unless_tuned(covering_row("dense_resident", problem, device), "a dense copy", device)


def _scratch_pays(problem: Problem, device: Device) -> str | None:
    row = covering_row("dense", problem, device)
    return _unless_tuned(row if row is not None and row.tile.first else None, "dequantising first", device)


def _wmma_pays(problem: Problem, device: Device) -> str | None:
    if problem.group not in GFX11_GROUPS:
        return f"group must be {', '.join(map(str, GFX11_GROUPS))}, not {problem.group}"
    return _unless_tuned(
        covering_row("gfx11_moe" if problem.experts else "gfx11_prefill", problem, device), "it", device
    )


def _tiles_of_64(problem: Problem, device: Device) -> str | None:
    return f"n must be a multiple of 8, not {problem.n}" if problem.n % 8 else sm90_group(problem.group, problem.k)


def _wmma_experts_pay(problem: Problem, device: Device) -> str | None:
    rows = problem.m * max(problem.k, problem.top_k * problem.n)  # gathered by 32-bit offsets in bytes
    if rows > MOST_GATHERED:
        return f"x and the routed rows must have at most {MOST_GATHERED} values, not {rows}"
    return _wmma_pays(problem, device)


def _unless_tuned(row: TuningRow | None, what: str, device: Device) -> str | None:
    return None if row is not None else f"no tuning row of {device.arch} says that {what} is faster here"


GPUS = ("gfx", "sm")
HALVES = ("bf16", "fp16")
MOST_GATHERED = 1 << 30
DECODE_ROWS = 16  # a dense copy is four times the bytes of the codes: it never serves so few rows

TABLE: tuple[Row, ...] = (
    Row(
        stem="dense_resident",
        does="the vendor BLAS over a dequantised copy that was made at load",
        layouts=tuple(LAYOUTS),
        arch=GPUS,
        m=(DECODE_ROWS + 1, None),
        also=_copy_pays,
    ),
    Row(
        stem="dense",
        does="one pass dequantises into a workspace, then the vendor BLAS, where that is faster",
        layouts=(SKINNY,),
        arch=GPUS,
        m=(DECODE_ROWS + 1, None),
        also=_scratch_pays,
    ),
    Row(
        stem="cpu_decode",
        does="JIT-compiled kernel over the packed words, a few rows",
        arch=("cpu",),
        m=(1, 16),
        needs="numba",
    ),
    Row(stem="cpu_prefill", does="JIT-compiled dequantise in cache, then sgemm", arch=("cpu",), needs="numba"),
    Row(
        stem="cpu_int4pack",
        does="torch's own int4 kernel",
        layouts=(INT4PACK,),
        arch=("cpu",),
        m=(1, 64),
        act=("bf16",),
        also=_int4pack_group,
    ),
    Row(
        stem="dense_resident",
        does="sgemm over a dequantised copy that was made at load",
        layouts=(EXLLAMA, SKINNY, INT4PACK),
        arch=("cpu",),
        m=(DECODE_ROWS + 1, None),
        also=_copy_pays,
    ),
    Row(
        stem="sm90_decode",
        does="few rows: codes straight into operands of mma.sync, K split over a cluster",
        layouts=(SM90,),
        arch=("sm90",),
        m=(1, 16),
        act=HALVES,
        needs="triton",
        also=_tiles_of_64,
    ),
    Row(
        stem="sm90_prefill",
        does="wgmma fed by codes dequantised in registers, x and codes by TMA",
        layouts=(SM90,),
        arch=("sm90",),
        act=HALVES,
        needs="triton",
        also=_tiles_of_64,
    ),
    Row(
        stem="triton_decode",
        does="few rows: K split over lanes and programs, added in a fixed order",
        layouts=(SKINNY,),
        arch=GPUS,
        m=(1, 16),
        act=HALVES,
        needs="triton",
        also=_whole_blocks,
    ),
    Row(
        stem="gfx11_prefill",
        does="WMMA driven by hand: codes unpacked once into LDS, or straight into operand registers",
        layouts=(SKINNY,),
        arch=("gfx11",),
        m=(DECODE_ROWS + 1, None),
        act=HALVES,
        needs="triton",
        also=_wmma_pays,
    ),
    Row(
        stem="triton_prefill",
        does="matrix units fed by codes dequantised tile by tile",
        layouts=(SKINNY,),
        arch=GPUS,
        act=HALVES,
        needs="triton",
        also=_whole_blocks,
    ),
    Row(stem="dense", does="the same, for whatever is left", layouts=(SKINNY,), arch=GPUS),
    Row(
        stem="dense",
        does="dequantise a block of rows into a reused buffer, then the vendor BLAS",
        layouts=(EXLLAMA, SKINNY, INT4PACK),
    ),
    Row(
        stem="cpu_moe",
        does="the linear kernels above, one routed expert at a time",
        op="moe",
        layouts=(EXLLAMA, INT4PACK),
        arch=("cpu",),
    ),
    Row(
        stem="gfx11_moe",
        does="WMMA driven by hand: two GEMMs over blocks of routed rows, then the sum over each token",
        op="moe",
        layouts=(SKINNY,),
        arch=("gfx11",),
        m=(DECODE_ROWS + 1, None),
        act=HALVES,
        needs="triton",
        also=_wmma_experts_pay,
    ),
    Row(
        stem="triton_moe",
        does="two GEMMs over blocks of routed rows, then the sum over each token",
        op="moe",
        layouts=(SKINNY,),
        arch=GPUS,
        act=HALVES,
        needs="triton",
        also=_whole_blocks,
    ),
)


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
    rows = [row for row in TABLE if row.unsupported(problem, device) is None]
    if not rows:
        raise Unsupported(_refusal(problem, device, None))
    return preferred if preferred in rows[0].layouts else rows[0].layouts[0]


def _first_layout(problem: Problem, device: Device) -> str | None:
    rows = sorted(TABLE, key=lambda row: row.stem != env.FORCED_KERNEL)
    return next((row.layouts[0] for row in rows if row.unsupported(problem, device) is None), None)


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
    plan = getattr(importlib.import_module(f".kernels.{stem}", __package__), "plan", None)
    return Served(problem=problem, stem=stem, launch=launch, tile=choice.tile, plan=plan)


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
