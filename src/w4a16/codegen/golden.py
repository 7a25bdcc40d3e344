"""Recorded machine code: golden/isa/<device>/<triton version>.csv, one line a kernel, and what has changed since.

A line names a launch (kernel, place in its plan, symbol, tile, problem) and holds what `read_isa` found; `opcodes`
counts the hot loop as "opcode:count ..." in descending order.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import triton

from ..device import Device
from .cases import Case, Place, cases, place_of
from .classes import CLASSES
from .isa import Isa, read_isa
from .stems import compile_stem

DEVICES = ("gfx1151", "sm90")  # those whose code is recorded
KEY = ("kernel", "launch", "symbol", "tile", "problem")
RESOURCES = ("registers", "scalar_registers", "shared_bytes", "spills", "scratch_bytes")
COLUMNS = (*KEY, *CLASSES, *RESOURCES, "opcodes")

Line = dict[str, str]


def record(device: Device, compiled: set[Place]) -> list[Line]:
    """Compiles the cases of `device`, with zero points, by the Triton that is imported.

    Of a GPU whose code is not kept, only rows that are not in `compiled` yet; adds those it compiles.
    """
    chosen = [case for case in cases(device) if device.name in DEVICES or place_of(case.row) not in compiled]
    compiled |= {place_of(case.row) for case in chosen}
    return [line for case in chosen for line in lines_of(case, device)]


def lines_of(case: Case, device: Device) -> list[Line]:
    compiled = compile_stem(case.row.stem, case.problem, device, case.row.tile)
    return [_line(case, place, read_isa(code)) for place, code in enumerate(compiled)]


def _line(case: Case, place: int, reading: Isa) -> Line:
    p = case.problem
    sizes = f"m={p.m} n={p.n} k={p.k} group={p.group} {p.act} {'asym' if p.has_zeros else 'sym'}"
    return {
        "kernel": case.row.stem,
        "launch": str(place),
        "symbol": reading.kernel,
        "tile": tile_text(case.row.tile),
        "problem": sizes + (f" experts={p.experts} top_k={p.top_k}" if p.experts else ""),
        **{kind: str(count) for kind, count in reading.counts.items()},
        **{name: str(getattr(reading, name)) for name in RESOURCES},
        "opcodes": " ".join(
            f"{op}:{n}" for op, n in sorted(reading.opcodes.items(), key=lambda item: (-item[1], item[0]))
        ),
    }


def tile_text(tile: Any) -> str:
    """A tile's fields that differ from their defaults, in order."""
    given = [field for field in fields(tile) if getattr(tile, field.name) != field.default]
    return " ".join(f"{field.name}={getattr(tile, field.name)}" for field in given)


def path_of(folder: Path, device: str) -> Path:
    return folder / device / f"{triton.__version__}.csv"


def write(lines: list[Line], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def load(path: Path) -> list[Line]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def differences(recorded: list[Line], found: list[Line]) -> list[str]:
    """One sentence for each line that is new, gone or changed; a change names the opcodes and resources."""
    before, after = _by_key(recorded), _by_key(found)
    gone = [f"{' '.join(key)}: no longer compiled" for key in before.keys() - after.keys()]
    new = [f"{' '.join(key)}: not recorded" for key in after.keys() - before.keys()]
    changed = []
    for key in before.keys() & after.keys():
        was, now = before[key], after[key]
        changes = [f"{name} {was[name]} -> {now[name]}" for name in RESOURCES if was[name] != now[name]]
        changes += _opcode_changes(was["opcodes"], now["opcodes"])
        if changes:
            changed.append(f"{' '.join(key)}: {', '.join(changes)}")
    return sorted(gone) + sorted(new) + sorted(changed)


def _by_key(lines: list[Line]) -> dict[tuple[str, ...], Line]:
    return {tuple(line[name] for name in KEY): line for line in lines}


def _opcode_changes(was: str, now: str) -> list[str]:
    before, after = opcode_counts(was), opcode_counts(now)
    return [f"{op} {before[op]} -> {after[op]}" for op in sorted(before | after) if before[op] != after[op]]


def opcode_counts(text: str) -> Counter[str]:
    """The `opcodes` column as counts."""
    return Counter({op: int(count) for op, count in (item.rsplit(":", 1) for item in text.split())})
