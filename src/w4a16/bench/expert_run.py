"""Runs the benchmark of expert layers: routed by an archetype, checked against fp32, then all providers timed."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import Device, current_device
from ..dispatch import record
from ..dispatch_table import TABLE
from ..errors import BadInput
from ..problem import ACT_DTYPES, Problem
from ..reference import reference_moe
from ..roofline.model import Routing, bound_seconds, flops, weight_bytes
from ..roofline.peaks import measured_here
from ..roofline.scopes import moe_facts
from ..tuning.table import tile_for
from .expert_cases import ExpertShape, random_experts, routed, some_experts
from .expert_peers import Prepared, Weights
from .expert_providers import ExpertProvider
from .run import BOUNDS
from .timer import ROTATE_BYTES, spread_percent, time_calls

ROTATED = 16  # routings in turn, each over other experts, so that few tokens find no weight in the last cache
CHECKED = 16  # tokens, compared with the reference


@dataclass(frozen=True, kw_only=True)
class ExpertResult:
    """One timed point: seconds of the whole layer after the router, and of its GEMMs alone where they can be told."""

    shape: ExpertShape
    routing: str
    problem: Problem
    provider: str
    kernel: str
    seconds: float
    gemm_seconds: float | None
    spread_percent: float
    error: float
    work: Routing
    padding: float | None
    bound_seconds: float

    @property
    def tflops(self) -> float:
        """Of the routed rows, without padding."""
        return flops(self.problem, self.work) / self.seconds * 1e-12

    @property
    def gb_per_s(self) -> float:
        """Of the 4-bit weights of the experts touched, whatever the provider reads."""
        return weight_bytes(self.problem, self.work) / self.seconds * 1e-9


@dataclass(frozen=True, kw_only=True)
class ExpertRefusal:
    """A provider that cannot serve a point, with its sentence: not supported, or wrong."""

    shape: ExpertShape
    problem: Problem
    provider: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class _Point:
    """The same tokens, routed ROTATED times, each time over other experts."""

    x: Tensor
    shares: Tensor
    ids: list[Tensor]


def run_experts(
    shapes: tuple[ExpertShape, ...],
    tokens: tuple[int, ...],
    routings: tuple[str, ...],
    providers: tuple[ExpertProvider, ...],
    *,
    act: str = "bf16",
    has_zeros: bool = False,
    device: str = "cpu",
    rounds: int = 15,
    seed: int = 0,
    gemms: bool = True,
    only: Collection[tuple[str, int]] | None = None,
) -> Iterator[ExpertResult | ExpertRefusal]:
    """Times every provider at every layer, routing and number of tokens, interleaved; `gemms`: their GEMMs too;
    `only`: at these (shape's name.routing, tokens).

    Raises BadInput when nothing is asked for.
    """
    if not (shapes and tokens and routings and providers):
        raise BadInput("bench: got no shape, routing, number of tokens or provider, wanted one of each. Name some.")
    if only is not None and not only:
        return
    where = torch.device(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    for shape in shapes:
        weights = random_experts(shape, act=act, has_zeros=has_zeros, device=where)
        prepared: dict[str, Prepared] = {}
        for routing in routings:
            for count in tokens:
                ids = routed(routing, count, shape, generator)  # of points left out, too: the others stay as they are
                if only is not None and (f"{shape.name}.{routing}", count) not in only:
                    continue
                turned = [(ids + turn * shape.experts // ROTATED) % shape.experts for turn in range(ROTATED)]
                point = _Point(
                    x=torch.randn(count, shape.hidden, device=where).to(ACT_DTYPES[act]),
                    shares=torch.rand(count, shape.top_k, device=where),
                    ids=[each.to(where) for each in turned],
                )
                problem = shape.problem(count, act, has_zeros)
                yield from _timed(shape, routing, problem, weights, point, providers, prepared, rounds, gemms)


def _timed(
    shape: ExpertShape,
    routing: str,
    problem: Problem,
    weights: Weights,
    point: _Point,
    providers: tuple[ExpertProvider, ...],
    prepared: dict[str, Prepared],
    rounds: int,
    gemms: bool,
) -> Iterator[ExpertResult | ExpertRefusal]:
    device = current_device(point.x.device)
    rows = torch.randperm(problem.m)[:CHECKED].to(point.x.device)
    wanted = expected(point.x, weights, point.shares, point.ids[0], rows)
    errors, kernels = {}, {}
    for provider in providers:
        sentence = provider.unsupported(problem, device)
        if sentence is None:
            if provider.name not in prepared:
                prepared[provider.name] = provider.prepare(weights, point.x.dtype)
            with record() as served:
                got = prepared[provider.name].layer(point.x, point.shares, point.ids[0])[rows].float()
            kernels[provider.name] = served[0][0] if served else provider.name
            errors[provider.name] = float((got - wanted).norm() / wanted.norm())
            bound = provider.roundings * BOUNDS[problem.act]
            if not errors[provider.name] <= bound:
                sentence = f"wrong: relative RMS {errors.pop(provider.name):.1e}, bound {bound:.0e}"
        if sentence is not None:
            yield ExpertRefusal(shape=shape, problem=problem, provider=provider.name, sentence=sentence)
    calls: dict[str, Callable[[int], object]] = {}
    copies = {}
    work = _work(problem, shape, point.ids[0])
    for name in errors:
        calls[name], copies[name] = functools.partial(_layer, prepared[name], point), ROTATED
        alone = prepared[name].gemms if gemms else None
        if alone is not None:
            copies[f"{name} gemms"] = turns = max(2, min(ROTATED, -(-ROTATE_BYTES // weight_bytes(problem, work))))
            repeats = [alone(point.x, point.shares, ids) for ids in point.ids[:turns]]
            calls[f"{name} gemms"] = functools.partial(_again, repeats)
    seconds = time_calls(calls, copies, point.x.device, rounds)
    for name, error in errors.items():
        alone_s = seconds.get(f"{name} gemms")
        yield ExpertResult(
            shape=shape,
            routing=routing,
            problem=problem,
            provider=name,
            kernel=kernels[name],
            seconds=statistics.median(seconds[name]),
            gemm_seconds=None if alone_s is None else statistics.median(alone_s),
            spread_percent=spread_percent(seconds[name]),
            error=error,
            work=work,
            padding=_padding(kernels[name], problem, device, shape.inter, point.ids[0]),
            bound_seconds=bound_seconds(problem, measured_here(point.x.device), work),
        )


def _layer(prepared: Prepared, point: _Point, turn: int) -> Tensor:
    return prepared.layer(point.x, point.shares, point.ids[turn])


def _again(repeats: list[Callable[[], object]], turn: int) -> object:
    return repeats[turn]()


def expected(x: Tensor, weights: Weights, shares: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """fp32 truth of some rows, by the experts that these have."""
    used, local = ids[rows].unique(return_inverse=True)
    w13, w2 = (some_experts(weight, used) for weight in weights)
    return reference_moe(x[rows], w13, w2, shares[rows], local)


def _work(problem: Problem, shape: ExpertShape, ids: Tensor) -> Routing:
    slots = ids.numel()
    return Routing(slots=slots, touched=len(ids.unique()), rows=slots, intermediate=shape.inter)


def _padding(kernel: str, problem: Problem, device: Device, inter: int, ids: Tensor) -> float | None:
    """The share of the rows in the blocks of one of our kernels that no token was routed to; None for another's."""
    if kernel not in {row.stem for row in TABLE if row.op == "moe"}:
        return None
    facts = moe_facts(ids, problem, inter, tile_for(kernel, problem, device))
    if "valid_blocks" not in facts:
        return None
    blocks, size, rows = (facts[name] for name in ("valid_blocks", "block_m", "n_routed"))
    assert isinstance(blocks, int)
    assert isinstance(size, int)
    assert isinstance(rows, int)
    return 1 - rows / (blocks * size)
