"""Runs a benchmark: each shape's weight is made once, every provider is checked against fp32, then all are timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import current_device
from ..dispatch import record
from ..errors import BadInput
from ..problem import ACT_DTYPES, Problem
from ..roofline.model import ACT_BYTES, bound_seconds, bytes_moved, flops, weight_bytes
from ..roofline.peaks import measured_here
from ..weight import QuantizedWeight
from .cases import Shape
from .peers import Multiply
from .providers import Provider, problem_of
from .timer import copies_for, spread_percent, time_calls

CHECKED_ROWS = 512  # of a result, first and last among them
# Relative RMS a result may have against fp32: the rounding of the output, and of the scales, in its dtype.
BOUNDS = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One timed point. seconds is a median over rounds; kernel names what dispatch ran, for w4a16."""

    shape: Shape
    problem: Problem
    provider: str
    kernel: str
    seconds: float
    spread_percent: float
    error: float
    bound_seconds: float

    @property
    def tflops(self) -> float:
        return flops(self.problem) / self.seconds * 1e-12

    @property
    def gb_per_s(self) -> float:
        """Of the bytes a 4-bit weight needs, whatever the provider reads."""
        return bytes_moved(self.problem) / self.seconds * 1e-9

    @property
    def share_of_bound(self) -> float:
        return self.bound_seconds / self.seconds


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A provider that cannot serve a point, with its sentence: not supported, or wrong."""

    shape: Shape
    problem: Problem
    provider: str
    sentence: str


def random_weight(shape: Shape, *, act: str, has_zeros: bool, device: torch.device) -> QuantizedWeight:
    """Random codes, scales and zero points on `device`: never constants, which run faster."""
    grid = (shape.n, shape.k // shape.group)
    return QuantizedWeight(
        codes=random_words((shape.n, shape.k // 8), device),
        scales=(torch.rand(grid, device=device) * 0.02 + 0.005).to(ACT_DTYPES[act]),
        zeros=torch.randint(0, 16, grid, device=device, dtype=torch.uint8) if has_zeros else None,
        group=shape.group,
    )


def random_words(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 words whose every nibble is uniform."""
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device)


def run(
    shapes: tuple[Shape, ...],
    batches: tuple[int, ...],
    providers: tuple[Provider, ...],
    *,
    act: str = "bf16",
    has_zeros: bool = False,
    device: str = "cpu",
    rounds: int = 15,
    only: Collection[tuple[str, int]] | None = None,
) -> Iterator[Result | Refusal]:
    """Times every provider at every shape and row count, interleaved; `only`: at these (shape's name, M).

    Raises BadInput when nothing is asked for.
    """
    if not (shapes and batches and providers):
        raise BadInput("bench: got no shape, batch or provider, wanted at least one of each. Name some.")
    where = torch.device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    for shape in shapes:
        asked = [m for m in batches if only is None or (shape.name, m) in only]
        if not asked:
            continue
        weight = random_weight(shape, act=act, has_zeros=has_zeros, device=where)
        prepared: dict[str, list[Multiply]] = {}
        dense = weight.dequantize(torch.float32)
        for m in asked:
            x = torch.randn(m, shape.k, device=where).to(ACT_DTYPES[act])
            yield from _point(shape, weight, dense, x, providers, prepared, rounds)


def _point(
    shape: Shape,
    weight: QuantizedWeight,
    dense: Tensor,
    x: Tensor,
    providers: tuple[Provider, ...],
    prepared: dict[str, list[Multiply]],
    rounds: int,
) -> Iterator[Result | Refusal]:
    problem, device = problem_of(weight, x), current_device(x.device)
    rows = torch.linspace(0, problem.m - 1, min(problem.m, CHECKED_ROWS), device=x.device).long()
    wanted = x[rows].float() @ dense.t()
    errors, kernels = {}, {}
    for provider in providers:
        sentence = provider.unsupported(problem, device)
        if sentence is None:
            copies = prepared.get(provider.name) or _prepare(provider, weight, problem, x.dtype)
            prepared[provider.name] = copies
            with record() as served:
                got = copies[-1](x)[rows]
            kernels[provider.name] = served[-1][0] if served else provider.name
            errors[provider.name] = float((got.float() - wanted).norm() / wanted.norm())
            bound = provider.roundings * BOUNDS[problem.act]
            if not errors[provider.name] <= bound:
                sentence = f"wrong: relative RMS {errors.pop(provider.name):.1e}, bound {bound:.0e}"
        if sentence is not None:
            yield Refusal(shape=shape, problem=problem, provider=provider.name, sentence=sentence)
    calls = {name: _with(prepared[name], x) for name in errors}
    out_bytes = problem.m * problem.n * x.element_size()  # each call of a burst has its own
    turns = {p.name: copies_for(_bytes(p, problem) + out_bytes) for p in providers if p.name in errors}
    seconds = time_calls(calls, turns, x.device, rounds)
    for name, times in seconds.items():
        yield Result(
            shape=shape,
            problem=problem,
            provider=name,
            kernel=kernels[name],
            seconds=statistics.median(times),
            spread_percent=spread_percent(times),
            error=errors[name],
            bound_seconds=bound_seconds(problem, measured_here(x.device)),
        )


def _prepare(provider: Provider, weight: QuantizedWeight, problem: Problem, act: torch.dtype) -> list[Multiply]:
    """As many packed copies as keep the last cache out of the timing."""
    return provider.prepare(weight, act, copies_for(_bytes(provider, problem)))


def _bytes(provider: Provider, problem: Problem) -> int:
    return problem.n * problem.k * ACT_BYTES[problem.act] if provider.dense else weight_bytes(problem)


def _with(copies: list[Multiply], x: Tensor) -> Callable[[int], Tensor]:
    return lambda copy: copies[copy](x)
