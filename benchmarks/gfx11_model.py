"""The model of codegen/model.py against what the sources measured on gfx1151; and what it says of gfx11_prefill.

    python benchmarks/gfx11_model.py

The sources' kernel, before and after #953 and #879 of ROCm's vLLM, is in rocm_prefill.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import triton
from rich.console import Console
from rich.table import Table
from rocm_prefill import source_launch

from w4a16.codegen.compile import Compiled, compile_launch
from w4a16.codegen.gfx11.launch import execute
from w4a16.codegen.gfx11.lds import Meter
from w4a16.codegen.isa import read_isa
from w4a16.codegen.model import Prediction, Trip, predict, read_trip
from w4a16.codegen.stems import compile_stem
from w4a16.codegen.verify import Check, compile_call, prepare
from w4a16.device import known_device
from w4a16.problem import Problem
from w4a16.tuning.table import tile_for
from w4a16.tuning.tiles import PrefillTile

GFX1151 = known_device("gfx1151")
GROUP = 128


@functools.cache
def source(act: str, zeros: bool, tile: PrefillTile) -> tuple[Compiled, Trip]:
    """The sources' kernel at one tile; its code does not depend on the sizes below."""
    problem = Problem(m=1606, n=4096, k=3584, group=GROUP, act=act, has_zeros=zeros)
    compiled = compile_launch(source_launch(problem, tile), GFX1151)
    return compiled, read_trip(compiled)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One change of a source: milliseconds before and after it, at one problem."""

    change: str
    problem: Problem
    before: PrefillTile
    after: PrefillTile
    milliseconds: tuple[float, float]

    def predicted(self) -> tuple[Prediction, Prediction]:
        first, second = (
            predict(self.problem, GFX1151, *source(self.problem.act, self.problem.has_zeros, tile))
            for tile in (self.before, self.after)
        )
        return first, second

    @property
    def ratio(self) -> float:
        return self.milliseconds[1] / self.milliseconds[0]

    @property
    def predicted_ratio(self) -> float:
        before, after = self.predicted()
        return after.seconds / before.seconds


def _tile(
    m: int, n: int, k: int, warps: int, stages: int = 2, unroll_k: int = 1, form: str = "int_subtract"
) -> PrefillTile:
    return PrefillTile(block_m=m, block_n=n, block_k=k, warps=warps, stages=stages, unroll_k=unroll_k, dequant=form)


def subtractions() -> Iterator[Measured]:
    """#953, bf16 with zero points, M=128: the tiles of the base ladder, two stages as was Triton's default."""
    for n, k, shape, times in (
        (24576, 4096, (64, 64, 64, 4), (1.519, 1.271)),
        (4096, 12288, (64, 16, 64, 1), (0.815, 0.685)),
        (6144, 4096, (64, 64, 64, 4), (0.371, 0.324)),
        (4096, 4096, (64, 32, 64, 4), (0.271, 0.234)),
    ):
        yield Measured(
            change="#953 floats to integers",
            problem=Problem(m=128, n=n, k=k, group=GROUP, act="bf16", has_zeros=True),
            before=_tile(*shape, form="float_subtract"),
            after=_tile(*shape),
            milliseconds=times,
        )


def tiles() -> Iterator[Measured]:
    """#879, fp16 without zero points, M=1606, K=3584: the wider tile with one stage."""
    for n, times in ((37888, (19.0, 17.5)), (18944, (9.6, 8.7)), (4608, (2.4, 2.1)), (3584, (1.8, 1.6))):
        yield Measured(
            change="#879 128x64x64 to 64x256x64",
            problem=Problem(m=1606, n=n, k=3584, group=GROUP, act="fp16"),
            before=_tile(128, 64, 64, 8),
            after=_tile(64, 256, 64, 8, stages=1),
            milliseconds=times,
        )


def unrolled() -> Iterator[Measured]:
    """#879's second commit: four K tiles a trip."""
    for n, times in ((37888, (17.1, 16.4)), (4608, (2.0, 1.97)), (3584, (1.6, 1.58))):
        yield Measured(
            change="#879 four K tiles a trip",
            problem=Problem(m=1606, n=n, k=3584, group=GROUP, act="fp16"),
            before=_tile(64, 256, 64, 8, stages=1),
            after=_tile(64, 256, 64, 8, stages=1, unroll_k=4),
            milliseconds=times,
        )


def profiled() -> Iterator[Measured]:
    """Both of #879's commits together, as the text of the request has them from a profile of the whole model."""
    for n, k, times in (
        (37888, 3584, (18.57, 17.34)),
        (3584, 18944, (10.37, 9.49)),
        (4608, 3584, (2.17, 2.21)),
        (3584, 3584, (1.69, 1.66)),
    ):
        yield Measured(
            change="#879 both, profiled",
            problem=Problem(m=1606, n=n, k=k, group=GROUP, act="fp16"),
            before=_tile(128, 64, 64, 8),
            after=_tile(64, 256, 64, 8, stages=1, unroll_k=4),
            milliseconds=times,
        )


def validation() -> Table:
    table = Table(title=f"milliseconds on gfx1151, predicted from Triton {triton.__version__}'s code / measured")
    for name in ("change", "M x N x K", "before", "after", "ratio predicted", "measured", "off"):
        table.add_column(name, justify="left" if name == "change" else "right", no_wrap=True)
    for case in (*subtractions(), *tiles(), *unrolled(), *profiled()):
        p, times = case.problem, case.milliseconds
        pairs = [f"{1e3 * got.seconds:.3f} / {was:.3f}" for got, was in zip(case.predicted(), times, strict=True)]
        off = f"{case.predicted_ratio / case.ratio - 1:+.1%}"
        ratios = (f"{case.predicted_ratio:.3f}", f"{case.ratio:.3f}", off)
        table.add_row(case.change, f"{p.m} x {p.n} x {p.k}", *pairs, *ratios)
    return table


def metered(stem: str, problem: Problem) -> tuple[Compiled, Trip]:
    """A kernel at its production tile, its LDS cycles as the emulator meets them in one program."""
    tile = tile_for(stem, problem, GFX1151)
    small = Problem(
        m=tile.block_m, n=tile.block_n, k=4 * GROUP, group=GROUP, act=problem.act, has_zeros=problem.has_zeros
    )
    *before, last = compile_call(prepare(Check(stem=stem, tile=tile, problem=small, bias=False), GFX1151), GFX1151)
    meter = Meter()
    for compiled in before:
        execute(compiled)
    execute(last, meter=meter)
    return compile_stem(stem, problem, GFX1151, tile)[-1], read_trip(last, meter)


def predictions(m: int, n: int, k: int) -> Table:
    """Both of w4a16's kernels and the source's; of that without bank conflicts, which only an execution shows."""
    table = Table(
        title=f"M={m} N={n} K={k} G={GROUP} on gfx1151, Triton {triton.__version__}; 128 columns of K, one wave"
    )
    for name in ("kernel", "tile", "x", "zeros"):
        table.add_column(name, no_wrap=True)
    for name in ("WMMA", "VALU", "scalar", "LDS", "conflicts", "bytes", "share", "VGPRs", "spills", "waves", "busy"):
        table.add_column(name, justify="right")
    table.add_column("issue + traffic, ms", justify="right", no_wrap=True)
    table.add_column("TFLOP/s", justify="right")
    problems = [
        Problem(m=m, n=n, k=k, group=GROUP, act=a, has_zeros=z) for a in ("fp16", "bf16") for z in (False, True)
    ]
    for stem, problem in itertools.product(("gfx11_prefill", "triton_prefill", "source"), problems):
        if stem == "source":
            form = "float_subtract" if problem.act == "fp16" else "int_subtract"
            tile = _tile(64, 256, 64, 8, stages=1, form=form) if m > 1024 else _tile(64, 64, 64, 4, form=form)
            compiled, trip = source(problem.act, problem.has_zeros, tile)
        else:
            compiled, trip = metered(stem, problem)
        reading, told = read_isa(compiled), predict(problem, GFX1151, compiled, trip)
        scale, sizes = 128 / trip.depth, compiled.launch.constants
        table.add_row(
            stem,
            f"{sizes['BLOCK_M']}x{sizes['BLOCK_N']} {compiled.warps}w",
            problem.act,
            "asym" if problem.has_zeros else "sym",
            *(f"{scale * cycles:.0f}" for cycles in (trip.matrix, trip.vector, reading.counts["scalar"], trip.shared)),
            "-" if stem == "source" else f"{scale * trip.conflicts:.0f}",
            f"{scale * trip.loaded:.0f}",
            f"{trip.matrix / (trip.matrix + trip.vector):.3f}",
            str(compiled.registers),
            str(compiled.spills),
            str(reading.waves),
            f"{told.busy:.3f}",
            f"{1e3 * told.issue:.2f} + {1e3 * told.traffic:.2f}",
            f"{told.tflops:.1f}",
            end_section=problem is problems[-1],
        )
    return table


if __name__ == "__main__":
    console = Console(width=170)
    console.print(validation())
    for shape in ((3968, 19456, 2560), (512, 4096, 4096), (64, 4096, 4096)):
        console.print(predictions(*shape))
