"""`w4a16 golden check` and `update`: see golden.py for the rules, command.py for why the standard library alone."""

from __future__ import annotations

import argparse
import datetime
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..device import product_name, session_facts
from ..errors import W4A16Error
from . import golden
from .cases import BATCHES, shapes_of

# The gfx11 suite's models, whose layers every new kernel has had to serve.
GOLDEN_MODELS = (
    *("gemma-2b", "qwen3-1.7b", "qwen3-4b", "qwen3-vl-4b", "qwen3-8b", "qwen2.5-7b", "qwen3.5-35b-a3b"),
    "l2-boundary",
)
UPDATE_PROCESSES, CHECK_PROCESSES = 5, 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="w4a16 golden", description="Compare this device with its recorded speed.")
    p.add_argument("action", choices=("check", "update"))
    p.add_argument("--folder", type=Path, default=Path("golden"), help="where the golden files are")
    p.add_argument("--reason", help="why the numbers change; update needs one")
    p.add_argument("--shapes", default=",".join(GOLDEN_MODELS), help="as in `w4a16 bench`")
    p.add_argument("--batches", default=",".join(map(str, BATCHES)), help="row counts M, comma-separated")
    p.add_argument("--act", default="bf16,fp16")
    p.add_argument("--zeros", default="sym,asym")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--processes", type=int, default=UPDATE_PROCESSES, help="whose medians `update` merges, 2 at least")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    path = options.folder / product_name() / "linear.csv"
    names = ("shapes", "batches", "act", "zeros", "rounds")
    bench = [f"--{name}={getattr(options, name)}" for name in names]
    try:
        if options.action == "update":
            return _update(path, bench, options.reason, options.processes)
        return _check(path, bench, _asked(options))
    except W4A16Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _update(path: Path, bench: Sequence[str], reason: str | None, processes: int) -> int:
    if processes < 2:
        print(f"golden update: got --processes {processes}, wanted 2 or more: one has no spread.", file=sys.stderr)
        return 2
    if not reason:
        print("golden update: got no reason, wanted --reason '...'. Say why the numbers change.", file=sys.stderr)
        return 2
    rows = golden.measure(bench, processes)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    date = datetime.date.today().isoformat()
    golden.write(path, rows, f"{session_facts()}; commit {commit or 'unknown'}; {date}; {reason}")
    print(f"{path}: {len(rows)} cases")
    for row in golden.noisy(rows):
        print(
            f"noisy: {row.key} spreads {row.spread_pct} %: repair it, a loss of {row.allowed_percent:.0f} % would pass"
        )
    return 0


def _asked(options: argparse.Namespace) -> set[golden.Key]:
    """The cases these options name: a part of a golden file can be checked alone."""
    zeros = [int(name == "asym") for name in options.zeros.split(",")]
    batches = [int(m) for m in options.batches.split(",")]
    shapes = [shape.name for shape in shapes_of(options.shapes)]
    return set(itertools.product(shapes, batches, options.act.split(","), zeros))


def _check(path: Path, bench: Sequence[str], asked: set[golden.Key]) -> int:
    recorded = [row for row in golden.read(path) if row.key in asked]
    measured = golden.measure(bench, CHECK_PROCESSES)
    findings = golden.compare(recorded, measured)
    for finding in findings:
        print(f"{'FAIL' if finding.fails else 'faster'} {' '.join(map(str, finding.key))}: {finding.sentence}")
    failed = sum(finding.fails for finding in findings)
    print(f"{path}: {len(recorded)} recorded, {len(measured)} measured, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
