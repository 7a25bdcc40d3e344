"""`w4a16 golden check|update|table`: see golden.py for the rules, command.py for why the standard library alone."""

from __future__ import annotations

import argparse
import datetime
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..device import product_name, session_facts, this_machine
from ..errors import W4A16Error
from ..problem import Problem
from ..roofline.peaks import file_of, measured
from . import golden
from .cases import BATCHES, shapes_of
from .expert_cases import TOKENS, expert_shapes_of
from .golden_table import experts_table, linear_table, other_kinds, write_between
from .warm import compile_all

# Of the gfx11 suite's models, 22 layers of different sizes.
GOLDEN_MODELS = ("gemma-2b", "qwen3-1.7b", "qwen3-vl-4b", "qwen3-8b", "qwen2.5-7b", "qwen3.5-35b-a3b", "l2-boundary")
GOLDEN_EXPERTS, GOLDEN_ROUTINGS = ("qwen3-30b-a3b", "qwen3.5-35b-a3b"), ("uniform", "zipf2")
UPDATE_PROCESSES, CHECK_PROCESSES = 5, 1


@dataclass(frozen=True, kw_only=True)
class Table:
    """One golden file: how it is measured, the cases it has, and what they launch."""

    path: Path
    bench: list[str]
    asked: set[golden.Key]
    problems: list[Problem]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="w4a16 golden", description="Compare this device with its recorded speed.")
    p.add_argument("action", choices=("check", "update", "table"))
    p.add_argument("--folder", type=Path, default=Path("golden"), help="where the golden files are")
    p.add_argument("--reason", help="why the numbers change; update needs one")
    p.add_argument("--tables", default="linear,experts", help="the files, comma-separated")
    p.add_argument("--shapes", default=",".join(GOLDEN_MODELS), help="as in `w4a16 bench`")
    p.add_argument("--batches", default=",".join(map(str, BATCHES)), help="row counts M, comma-separated")
    p.add_argument("--experts", default=",".join(GOLDEN_EXPERTS), help="shapes, as in `w4a16 bench --moe`")
    p.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of the expert layers, comma-separated")
    p.add_argument("--routing", default=",".join(GOLDEN_ROUTINGS), help="of the expert layers, comma-separated")
    p.add_argument("--act", default="bf16,fp16")
    p.add_argument("--zeros", default="sym,asym")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--processes", type=int, help=f"whose medians `update` merges (default {UPDATE_PROCESSES})")
    p.add_argument("--merge", action="store_true", help="`update`: with what is kept in raw/ of other sessions, too")
    p.add_argument("--product", default=product_name(), help="the device's folder, to merge where it is not")
    p.add_argument("--readme", type=Path, help="`table`: the file to write it to, between the product's markers")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.action == "table":
            return _table(options)
        tables = [_TABLES[name](options) for name in options.tables.split(",")]
        return _update(tables, options) if options.action == "update" else _check(tables, options.processes)
    except W4A16Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _update(tables: Sequence[Table], options: argparse.Namespace) -> int:
    count = UPDATE_PROCESSES if options.processes is None else options.processes
    before = [golden.kept(table.path) if options.merge else {} for table in tables]
    if count + min(map(len, before)) < 2:
        got = f"got --processes {count} and {min(map(len, before))} kept, wanted 2 or more"
        print(f"golden update: {got}: one has no spread.", file=sys.stderr)
        return 2
    if not options.reason:
        print("golden update: got no reason, wanted --reason '...'. Say why the numbers change.", file=sys.stderr)
        return 2
    measured = _measured(tables, count) if count else [[] for _ in tables]
    for table, runs, earlier in zip(tables, measured, before, strict=True):
        sessions = list(dict.fromkeys(map(golden.session_of, earlier)))
        if runs:
            sessions.append(_session(options.reason))
            golden.keep(table.path, runs, sessions[-1])
        rows = golden.merged([*earlier.values(), *runs])
        golden.write(table.path, rows, " | ".join(sessions))
        print(f"{table.path}: {len(rows)} cases of {len(earlier) + len(runs)} processes")
        for row in golden.noisy(rows):
            loss = f"a loss of {row.allowed_percent:.0f} % would pass"
            print(f"noisy: {row.key} spreads {row.spread_pct} %: repair it, {loss}")
    return 0


def _table(options: argparse.Namespace) -> int:
    folder, product = options.folder, options.product
    linear, experts = (golden.read(folder / product / f"{name}.csv") for name in ("linear", "experts"))
    device = measured(this_machine(), product, folder) if file_of(product, folder).is_file() else None
    text = "\n".join([linear_table(linear, device), experts_table(experts), other_kinds(linear)])
    if options.readme is None:
        print(text)
    else:
        write_between(options.readme, product, text)
    return 0


def _session(reason: str) -> str:
    described = ["git", "describe", "--always", "--dirty", "--exclude=*"]  # says where the tree is not the commit's
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip()
    return f"{session_facts()}; commit {commit or 'unknown'}; {datetime.date.today().isoformat()}; {reason}"


def _check(tables: Sequence[Table], processes: int | None) -> int:
    recorded = [golden.read(table.path) for table in tables]
    count = processes or CHECK_PROCESSES
    before = [[row for row in rows if row.key in table.asked] for table, rows in zip(tables, recorded, strict=True)]
    measured = _measured(tables, count, before)
    failed = [_compare(*each) for each in zip(tables, before, map(golden.merged, measured), strict=True)]
    return int(any(failed))


def _measured(
    tables: Sequence[Table], count: int, recorded: Sequence[Sequence[golden.Row]] | None = None
) -> list[list[golden.Run]]:
    """What each process measured. All are started before anything is compiled: they load what they need meanwhile.

    Cases that fail against what is recorded are measured again, in as many processes as make an odd number of three
    or more; the median decides.
    """
    again = 0 if recorded is None else 3 - count if count < 3 else 2
    processes = [[golden.Process(table.bench) for _ in range(count + again)] for table in tables]
    try:
        begun = time.monotonic()
        compiled = compile_all([problem for table in tables for problem in table.problems], this_machine())
        for process in itertools.chain.from_iterable(processes):
            process.wait_until_ready()
        print(f"{compiled} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)
        found: list[list[golden.Run]] = []
        for i, (table, each) in enumerate(zip(tables, processes, strict=True)):
            found.append([_timed(table, process) for process in each[:count]])
            findings = [] if recorded is None else golden.compare(recorded[i], golden.merged(found[-1]))
            slow = {finding.key for finding in findings if finding.fails}
            if slow:
                print(f"{table.path.name}: {len(slow)} cases in {again} more processes", flush=True)
                found[-1] += [process.rows(slow) for process in each[count:]]
        return found
    finally:
        for process in itertools.chain.from_iterable(processes):
            process.close()


def _timed(table: Table, process: golden.Process) -> golden.Run:
    begun = time.monotonic()
    rows = process.rows()
    print(f"{table.path.name}: {len(rows)} cases in {time.monotonic() - begun:.1f} s", flush=True)
    return rows


def _compare(table: Table, recorded: Sequence[golden.Row], measured: Sequence[golden.Row]) -> int:
    """Prints every difference; how many fail. A part of a golden file can be checked alone."""
    findings = golden.compare(recorded, measured)
    for finding in findings:
        print(f"{'FAIL' if finding.fails else 'faster'} {' '.join(map(str, finding.key))}: {finding.sentence}")
    failed = sum(finding.fails for finding in findings)
    print(f"{table.path}: {len(recorded)} recorded, {len(measured)} measured, {failed} failed")
    return failed


def _kinds(options: argparse.Namespace) -> list[tuple[str, bool]]:
    return [(act, zeros == "asym") for act in options.act.split(",") for zeros in options.zeros.split(",")]


def _linear(options: argparse.Namespace) -> Table:
    shapes, batches, kinds = shapes_of(options.shapes), _numbers(options.batches), _kinds(options)
    points = list(itertools.product(shapes, batches, kinds))
    return Table(
        path=options.folder / options.product / "linear.csv",
        bench=[f"--{name}={getattr(options, name)}" for name in ("shapes", "batches", "act", "zeros", "rounds")],
        asked={(shape.name, m, act, int(asym)) for shape, m, (act, asym) in points},
        problems=[
            Problem(m=m, n=shape.n, k=shape.k, group=shape.group, act=act, has_zeros=asym)
            for shape, m, (act, asym) in points
        ],
    )


def _experts(options: argparse.Namespace) -> Table:
    shapes, tokens, kinds = expert_shapes_of(options.experts), _numbers(options.tokens), _kinds(options)
    points = list(itertools.product(shapes, tokens, kinds))
    given = {"shapes": options.experts, "batches": options.tokens}
    given |= {name: getattr(options, name) for name in ("routing", "act", "zeros", "rounds")}
    return Table(
        path=options.folder / options.product / "experts.csv",
        bench=["--moe", "--no-gemms", *(f"--{name}={value}" for name, value in given.items())],
        asked={
            (f"{shape.name}.{routing}", m, act, int(asym))
            for shape, m, (act, asym) in points
            for routing in options.routing.split(",")
        },
        problems=[shape.problem(m, act, asym) for shape, m, (act, asym) in points],
    )


def _numbers(given: str) -> list[int]:
    return [int(number) for number in given.split(",")]


_TABLES = {"linear": _linear, "experts": _experts}


if __name__ == "__main__":
    sys.exit(main())
