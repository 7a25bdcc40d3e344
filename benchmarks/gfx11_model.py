"""The model of codegen/model.py against what the sources measured on gfx1151; and what it says of gfx11_prefill.

    python benchmarks/gfx11_model.py

The sources' kernel is that of the gfx11 branch of ROCm's vLLM, written anew from its description, before and after its
#953 (bf16: subtract the zero point as floats or as integers) and #879 (a wider tile; four K tiles a trip).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table

from w4a16.codegen.compile import Compiled, compile_launch
from w4a16.codegen.gfx11.launch import execute
from w4a16.codegen.gfx11.lds import Meter
from w4a16.codegen.isa import read_isa
from w4a16.codegen.model import Prediction, Trip, predict, read_trip
from w4a16.codegen.stems import compile_stem
from w4a16.codegen.verify import Check, compile_call, prepare
from w4a16.device import known_device
from w4a16.kernels._launch import Launch
from w4a16.problem import ACT_DTYPES, Problem
from w4a16.tuning.table import tile_for
from w4a16.tuning.tiles import PrefillTile

GFX1151 = known_device("gfx1151")
GROUP = 128


@triton.jit
def _source(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N, K//8] int32, nibble order 0 2 4 6 1 3 5 7
    scales_ptr,  # [N, K//G]
    zeros_ptr,  # [N, K//G] in the activation dtype, or None
    M,
    N,
    K,
    K8,
    groups,
    GROUP: tl.constexpr,
    INT_SUBTRACT: tl.constexpr,
    UNROLL_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    shift = column % 8 // 2 * 4 + column % 2 * 16
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for trip in range(tl.cdiv(K, BLOCK_K * UNROLL_K)):
        for part in tl.static_range(UNROLL_K):
            step = trip * UNROLL_K + part
            k = step * BLOCK_K + column
            word = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
            codes = tl.load(
                codes_ptr + n[:, None] * K8 + word[None, :], mask=(n[:, None] < N) & (word[None, :] < K8), other=0
            )
            codes = tl.interleave(codes, codes)
            codes = tl.interleave(codes, codes)
            codes = tl.interleave(codes, codes)
            codes = (codes >> shift[None, :]) & 0xF
            group = step * BLOCK_K // GROUP
            scale = tl.load(scales_ptr + n * groups + group, mask=n < N, other=0.0)
            if zeros_ptr is None:
                w = (codes - 8).to(x.dtype) * scale[:, None]
            else:
                zero = tl.load(zeros_ptr + n * groups + group, mask=n < N, other=0.0)
                if INT_SUBTRACT:
                    w = (codes - zero.to(tl.int32)[:, None]).to(x.dtype) * scale[:, None]
                else:
                    w = (codes.to(x.dtype) - zero[:, None]) * scale[:, None]
            acc = tl.dot(x, tl.trans(w), acc)
    at = out_ptr + m[:, None] * N + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@functools.cache
def source(act: str, zeros: bool, tile: PrefillTile) -> tuple[Compiled, Trip]:
    """The sources' kernel at one tile; its code does not depend on the sizes below."""
    m, n, k = 1606, 4096, 3584

    def empty(*shape: int, dtype: torch.dtype = ACT_DTYPES[act]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    launch = Launch(
        fn=_source,
        grid=(triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n)),
        args={
            "out_ptr": empty(m, n),
            "x_ptr": empty(m, k),
            "codes_ptr": empty(n, k // 8, dtype=torch.int32),
            "scales_ptr": empty(n, k // GROUP),
            "zeros_ptr": empty(n, k // GROUP) if zeros else None,
            "M": m,
            "N": n,
            "K": k,
            "K8": k // 8,
            "groups": k // GROUP,
        },
        constants={
            "GROUP": GROUP,
            "INT_SUBTRACT": tile.dequant == "int_subtract",
            "UNROLL_K": tile.unroll_k,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    compiled = compile_launch(launch, GFX1151)
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


def validation() -> Table:
    table = Table(title=f"milliseconds on gfx1151, predicted from Triton {triton.__version__}'s code / measured")
    for name in ("change", "M x N x K", "before", "after", "ratio predicted", "measured", "off"):
        table.add_column(name, justify="left" if name == "change" else "right", no_wrap=True)
    for case in (*subtractions(), *tiles(), *unrolled()):
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
    table = Table(title=f"M={m} N={n} K={k} G={GROUP} on gfx1151, Triton {triton.__version__}")
    problems = [
        Problem(m=m, n=n, k=k, group=GROUP, act=a, has_zeros=z) for a in ("fp16", "bf16") for z in (False, True)
    ]
    columns = [(stem, problem) for stem in ("gfx11_prefill", "triton_prefill") for problem in problems]
    table.add_column("one wave, 128 columns of K", no_wrap=True)
    for stem, problem in columns:
        table.add_column(
            f"{stem.split('_')[0]}\n{problem.act}\n{'asym' if problem.has_zeros else 'sym'}", justify="right"
        )
    rows: dict[str, list[str]] = {}
    for stem, problem in columns:
        compiled, trip = metered(stem, problem)
        reading, told = read_isa(compiled), predict(problem, GFX1151, compiled, trip)
        scale, sizes = 128 / trip.depth, compiled.launch.constants
        cells = {
            "tile": f"{sizes['BLOCK_M']}x{sizes['BLOCK_N']} {compiled.warps}w",
            "WMMA cycles": f"{scale * trip.matrix:.0f}",
            "VALU cycles": f"{scale * trip.vector:.0f}",
            "scalar instructions": f"{scale * reading.counts['scalar']:.0f}",
            "LDS cycles": f"{scale * trip.shared:.0f}",
            "of them conflicts": f"{scale * trip.conflicts:.0f}",
            "global bytes": f"{scale * trip.loaded:.0f}",
            "waits, alone": f"{scale * trip.exposed:.0f}",
            "matrix-issue share": f"{trip.matrix / (trip.matrix + trip.vector):.3f}",
            "VGPRs, spills": f"{compiled.registers}, {compiled.spills}",
            "waves a SIMD": str(reading.waves),
            "issue ms": f"{1e3 * told.issue:.2f}",
            "traffic ms": f"{1e3 * told.traffic:.2f}",
            "TFLOP/s": f"{told.tflops:.1f}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    for name, row in rows.items():
        table.add_row(name, *row)
    return table


if __name__ == "__main__":
    console = Console(width=170)
    console.print(validation())
    for shape in ((3968, 19456, 2560), (512, 4096, 4096), (64, 4096, 4096)):
        console.print(predictions(*shape))
