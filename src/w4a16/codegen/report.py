"""Readings of machine code as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import triton
from rich.table import Table

from .classes import CLASSES, classify
from .isa import Isa


@dataclass(frozen=True, kw_only=True)
class Column:
    """One launch of a table: what it is called there, and its reading."""

    title: str
    reading: Isa


def isa_table(columns: Iterable[Column]) -> Table:
    found = list(columns)
    table = Table("hot loop", title=f"Triton {triton.__version__}")
    for column in found:
        table.add_column(column.title, justify="right", overflow="fold")

    def row(name: str, cell: Callable[[Column], str]) -> None:
        table.add_row(name, *(cell(column) for column in found))

    row("trips counted", lambda c: str(c.reading.trips))
    for kind in CLASSES:
        row(f"{kind} instructions", lambda c, kind=kind: str(c.reading.counts[kind]))  # type: ignore[misc]
    row("matrix-issue share", lambda c: _percent(c.reading.matrix_share))
    row("vector per weight and lane", lambda c: _number(c.reading.vector_per_weight))
    table.add_section()
    row("vector registers", lambda c: str(c.reading.registers))
    row("scalar registers", lambda c: str(c.reading.scalar_registers or "-"))
    row("LDS / shared bytes", lambda c: f"{c.reading.shared_bytes:,}")
    row("spills", lambda c: str(c.reading.spills))
    row("scratch bytes a lane", lambda c: str(c.reading.scratch_bytes))
    row("warps a program", lambda c: str(c.reading.warps))
    row("resident waves", lambda c: f"{c.reading.waves} a {c.reading.where}")
    return table


def opcode_table(columns: Iterable[Column]) -> Table:
    """Each opcode of the hot loops, by class and then by how often it occurs."""
    found = list(columns)
    table = Table(title=f"Triton {triton.__version__}")
    table.add_column("opcode", no_wrap=True)
    table.add_column("class")
    for column in found:
        table.add_column(column.title, justify="right", overflow="fold")
    arch = found[0].reading.arch
    total = sum((column.reading.opcodes for column in found), Counter[str]())
    for opcode in sorted(total, key=lambda op: (CLASSES.index(classify(op, arch)), -total[op], op)):
        table.add_row(opcode, classify(opcode, arch), *(str(c.reading.opcodes[opcode] or "") for c in found))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f}"
