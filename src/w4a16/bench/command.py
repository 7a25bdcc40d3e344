"""The benchmark's command line, on the standard library alone: GPU machines often have nothing else."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ..device import this_machine
from ..errors import BadInput, W4A16Error, explain_mismatch
from ..problem import ACT_DTYPES
from ..roofline.peaks import measured_here
from .cases import BATCHES, MODELS, shapes_of
from .providers import PROVIDERS, providers_of
from .report import as_csv, as_json, as_markdown, compact, write_png
from .run import Refusal, Result, run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="w4a16 bench", description="Time kernels and their peers, after checking them.")
    p.add_argument("--shapes", default="8b", help=f"comma-separated: 8b, NxK, {', '.join(MODELS)}")
    p.add_argument("--group", type=int, help="columns a scale, in place of the shape's own")
    p.add_argument("--batches", default=",".join(map(str, BATCHES)), help="row counts M, comma-separated")
    p.add_argument(
        "--providers", default="w4a16,cublas,tinygemm,gemlite", help=f"comma-separated: {', '.join(PROVIDERS)}"
    )
    p.add_argument("--act", default="bf16", help="activation dtypes, comma-separated: bf16, fp16, fp32")
    p.add_argument("--zeros", default="sym", help="sym, asym or both, comma-separated")
    p.add_argument("--device", default=this_machine().type, help="cpu, cuda, cuda:1 ...")
    p.add_argument("--rounds", type=int, default=15, help="how often each point is timed")
    for name in ("csv", "json", "markdown", "png"):
        p.add_argument(f"--{name}", type=Path, help="also write this file")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        _bench(options)
    except W4A16Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def names_of(given: str, known: Collection[str]) -> list[str]:
    """The comma-separated names. Raises BadInput when one is not known."""
    for name in given.split(","):
        if name not in known:
            raise BadInput(explain_mismatch("option", got=name, wanted=", ".join(known), then="Correct it."))
    return given.split(",")


def _bench(options: argparse.Namespace) -> None:
    shapes = shapes_of(options.shapes)
    if options.group is not None:
        shapes = tuple(replace(s, group=s.k if options.group == -1 else options.group) for s in shapes)
    batches = tuple(int(m) for m in options.batches.split(","))
    device = measured_here(options.device)
    providers = providers_of(options.providers)
    results: list[Result] = []
    refusals: list[Refusal] = []
    for act, zeros in itertools.product(names_of(options.act, ACT_DTYPES), names_of(options.zeros, ("sym", "asym"))):
        before = len(results)
        asym = zeros == "asym"
        for point in run(
            shapes, batches, providers, act=act, has_zeros=asym, device=options.device, rounds=options.rounds
        ):
            if isinstance(point, Result):
                results.append(point)
            else:
                refusals.append(point)
        print(f"{device.model}, {act}, {zeros}; microseconds")
        print(compact(results[before:]), flush=True)
    for provider, why in dict.fromkeys((r.provider, r.sentence) for r in refusals):
        print(f"not timed: {provider} ({why})")
    writers = {"csv": as_csv(results), "json": as_json(results, refusals), "markdown": as_markdown(results)}
    for name, text in writers.items():
        path = getattr(options, name)
        if path is not None:
            path.write_text(text)
    if options.png is not None:
        write_png(results, device, options.png)
