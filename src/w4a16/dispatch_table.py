"""The kernels and what each of them serves: one ordered table, as data. dispatch.py takes the first row that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .device import Device, installed
from .layouts import EXLLAMA, INT4PACK, LAYOUTS, SKINNY, SM90
from .layouts.sm90 import sm90_group
from .problem import Problem
from .tuning.gfx11_tiles import GROUPS as GFX11_GROUPS
from .tuning.table import TuningRow, covering_row

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


def _pairs_of_tiles(problem: Problem, device: Device) -> str | None:
    if problem.n % 128 or problem.k % 8:
        return f"n must be a multiple of 128 (gate and up in tiles of 64) and k of 8, not {problem.n} and {problem.k}"
    return sm90_group(problem.group, problem.k)


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
        stem="sm90_moe",
        does="wgmma over blocks of routed rows: gate and up in one thread, rows of x gathered, then each token's sum",
        op="moe",
        layouts=(SM90,),
        arch=("sm90",),
        act=HALVES,
        needs="triton",
        also=_pairs_of_tiles,
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
