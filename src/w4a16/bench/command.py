"""The benchmark's command line, on the standard library alone: GPU machines often have nothing else."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..device import this_machine
from ..errors import BadInput, W4A16Error, explain_mismatch
from ..problem import ACT_DTYPES
from ..roofline.peaks import measured_here
from . import expert_providers, expert_report, providers, report
from .cases import BATCHES, MODELS, Shape, shapes_of
from .expert_cases import EXPERTS, ROUTINGS, TOKENS, ExpertShape, expert_shapes_of
from .expert_run import ExpertRefusal, ExpertResult, run_experts
from .run import Refusal, Result, run

LINEAR_PROVIDERS, EXPERT_PROVIDERS = "w4a16,cublas,tinygemm,gemlite,humming", "w4a16,grouped_mm,humming"  # by default
READY = "ready"  # what a process that waits says
AnyShape = TypeVar("AnyShape", Shape, ExpertShape)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="w4a16 bench", description="Time kernels and their peers, after checking them.")
    p.add_argument("--moe", action="store_true", help="expert layers in place of linear ones")
    p.add_argument(
        "--shapes",
        help=f"comma-separated: 8b (the default), NxK, {', '.join(MODELS)}; with --moe: "
        f"EXPERTSxTOP_KxHIDDENxINTER, {', '.join(EXPERTS)} (default the first)",
    )
    p.add_argument("--group", type=int, help="columns a scale, in place of the shape's own")
    p.add_argument("--batches", help="row counts M, or tokens, comma-separated")
    p.add_argument("--routing", default="uniform", help=f"with --moe, comma-separated: {', '.join(ROUTINGS)}")
    p.add_argument("--seed", type=int, default=0, help="of the routing, with --moe")
    p.add_argument("--no-gemms", action="store_true", help="with --moe: do not time the GEMMs alone")
    p.add_argument(
        "--providers",
        help=f"comma-separated: {', '.join(providers.PROVIDERS)} (default {LINEAR_PROVIDERS}); with --moe: "
        f"{', '.join(expert_providers.PROVIDERS)} (default {EXPERT_PROVIDERS})",
    )
    p.add_argument("--act", default="bf16", help="activation dtypes, comma-separated: bf16, fp16, fp32")
    p.add_argument("--zeros", default="sym", help="sym, asym or both, comma-separated")
    p.add_argument("--device", default=this_machine().type, help="cpu, cuda, cuda:1 ...")
    p.add_argument("--rounds", type=_rounds, default=15, help="how often each point is timed, 2 or more")
    p.add_argument(
        "--wait",
        action="store_true",
        help=f"say `{READY}`, and start when standard input has a line: null, or the points to time as "
        "[[case, M, act, 1 if asym else 0]]",
    )
    p.set_defaults(only=None)
    for name in ("csv", "json", "markdown", "png"):
        p.add_argument(f"--{name}", type=Path, help="also write this file")
    return p


def _rounds(given: str) -> int:
    if int(given) < 2:
        raise argparse.ArgumentTypeError(f"got {given}, wanted 2 or more: one has no spread")
    return int(given)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        bench = _experts if options.moe else _linear
        if options.wait:
            _prepare(options)
            print(READY, flush=True)
            only = json.loads(sys.stdin.readline())
            options.only = None if only is None else {tuple(key) for key in only}
        bench(options)
    except W4A16Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _prepare(options: argparse.Namespace) -> None:
    """Measures the first point: contexts, libraries and compilers take seconds before the first result."""
    for act, asym in itertools.islice(_kinds(options), 1):
        given = {"act": act, "has_zeros": asym, "device": options.device, "rounds": 2}
        if options.moe:
            routings = names_of(options.routing, ROUTINGS)[:1]
            tokens = _numbers(options.batches, TOKENS)[:1]
            list(run_experts(_expert_shapes(options)[:1], tokens, tuple(routings), _expert_providers(options), **given))
        else:
            batches = _numbers(options.batches, BATCHES)[:1]
            list(run(_linear_shapes(options)[:1], batches, _linear_providers(options), **given))


def _linear_shapes(options: argparse.Namespace) -> tuple[Shape, ...]:
    return _grouped(shapes_of(options.shapes or "8b"), options.group, lambda shape: shape.k)


def _linear_providers(options: argparse.Namespace) -> tuple[providers.Provider, ...]:
    return providers.providers_of(options.providers or LINEAR_PROVIDERS)


def _expert_shapes(options: argparse.Namespace) -> tuple[ExpertShape, ...]:
    return _grouped(expert_shapes_of(options.shapes or next(iter(EXPERTS))), options.group, lambda shape: shape.inter)


def _expert_providers(options: argparse.Namespace) -> tuple[expert_providers.ExpertProvider, ...]:
    return expert_providers.expert_providers_of(options.providers or EXPERT_PROVIDERS)


def names_of(given: str, known: Collection[str]) -> list[str]:
    """The comma-separated names. Raises BadInput when one is not known."""
    for name in given.split(","):
        if name not in known:
            raise BadInput(explain_mismatch("option", got=name, wanted=", ".join(known), then="Correct it."))
    return given.split(",")


def _grouped(shapes: tuple[AnyShape, ...], group: int | None, whole: Callable[[AnyShape], int]) -> tuple[AnyShape, ...]:
    """The shapes with the group that was asked for; -1: all of K."""
    if group is None:
        return shapes
    return tuple(replace(shape, group=whole(shape) if group == -1 else group) for shape in shapes)


def _numbers(given: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return default if given is None else tuple(map(int, given.split(",")))
    except ValueError:
        wanted = "numbers such as 1,16,512"
        raise BadInput(explain_mismatch("rows", got=given, wanted=wanted, then="Correct them.")) from None


def _kinds(options: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    zeros = names_of(options.zeros, ("sym", "asym"))
    for act, kind in itertools.product(names_of(options.act, ACT_DTYPES), zeros):
        yield act, kind == "asym"


def _only(options: argparse.Namespace, act: str, asym: bool) -> set[tuple[str, int]] | None:
    """The points of one kind that were asked for, as (case, M); None: all."""
    if options.only is None:
        return None
    return {(case, m) for case, m, kind, zeros in options.only if (kind, zeros) == (act, int(asym))}


def _title(options: argparse.Namespace, act: str, asym: bool) -> str:
    return f"{measured_here(options.device).model}, {act}, {'asym' if asym else 'sym'}; microseconds"


def _linear(options: argparse.Namespace) -> None:
    shapes, chosen = _linear_shapes(options), _linear_providers(options)
    results: list[Result] = []
    refusals: list[Refusal] = []
    for act, asym in _kinds(options):
        before, batches = len(results), _numbers(options.batches, BATCHES)
        given = {"act": act, "has_zeros": asym, "device": options.device, "rounds": options.rounds}
        for point in run(shapes, batches, chosen, **given, only=_only(options, act, asym)):
            if isinstance(point, Result):
                results.append(point)
            else:
                refusals.append(point)
        print(f"{_title(options, act, asym)}\n{report.compact(results[before:])}", flush=True)
    _write(options, report.COLUMNS, report.rows(results), refusals)
    if options.png is not None:
        report.write_png(results, measured_here(options.device), options.png)


def _experts(options: argparse.Namespace) -> None:
    shapes, chosen = _expert_shapes(options), _expert_providers(options)
    routings = tuple(names_of(options.routing, ROUTINGS))
    if options.png is not None:
        wanted = "another report"
        raise BadInput(explain_mismatch("--png with --moe", got=options.png, wanted=wanted, then="Pass --csv."))
    results: list[ExpertResult] = []
    refusals: list[ExpertRefusal] = []
    for act, asym in _kinds(options):
        before, tokens = len(results), _numbers(options.batches, TOKENS)
        given = {"act": act, "has_zeros": asym, "device": options.device, "rounds": options.rounds}
        given |= {"seed": options.seed, "gemms": not options.no_gemms, "only": _only(options, act, asym)}
        for point in run_experts(shapes, tokens, routings, chosen, **given):
            if isinstance(point, ExpertResult):
                results.append(point)
            else:
                refusals.append(point)
        title = f"{_title(options, act, asym)}: whole layer / its GEMMs alone"
        print(f"{title}\n{expert_report.compact(results[before:])}", flush=True)
    _write(options, expert_report.COLUMNS, expert_report.rows(results), refusals)


def _write(
    options: argparse.Namespace,
    columns: Sequence[str],
    table: Sequence[Sequence[str]],
    refusals: Sequence[Refusal | ExpertRefusal],
) -> None:
    """Says what was not timed, and writes the files that were asked for."""
    for provider, why in dict.fromkeys((r.provider, r.sentence) for r in refusals):
        print(f"not timed: {provider} ({why})")
    writers = {
        "csv": report.as_csv(columns, table),
        "json": report.as_json(columns, table, refusals),
        "markdown": report.as_markdown(columns, table),
    }
    for name, text in writers.items():
        path = getattr(options, name)
        if path is not None:
            path.write_text(text)
