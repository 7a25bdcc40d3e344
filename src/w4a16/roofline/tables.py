"""A report as a table for a plain terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields

from .names import ATTENTION, COPY, OTHER, W4A16
from .report import Report, Row

COLUMNS = (
    *("calls", "ms", "us/call", "% step", "GFLOP", "MB", "FLOP/B"),
    *("TFLOP/s", "GB/s", "bound us", "% bound", "binds"),
)


def cells(row: Row) -> tuple[str, ...]:
    """A row's figures as text, in the order of COLUMNS: FLOPs, bytes and bound are those of one call, on average."""

    known = row.known_calls
    return (
        str(row.calls),
        f"{row.us * 1e-3:.3f}",
        f"{row.us / row.calls:.2f}",
        f"{100 * row.share:.2f}",
        _figure(row.flops / known * 1e-9 if known else None),
        _figure(row.bytes / known * 1e-6 if known else None),
        _figure(row.intensity),
        _figure(row.tflops),
        _figure(row.gb_per_s),
        _figure(row.bound_us / known if known and row.bound_us else None),
        _figure(100 * row.share_of_bound if row.share_of_bound is not None else None),
        row.binds or "-",
    )


def _figure(value: float | None) -> str:
    """Three digits that count."""
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_table(report: Report, top: int = 40) -> str:
    """The report for a plain terminal."""
    shown = report.rows[:top]
    table = [(row.name, *cells(row)) for row in shown]
    head = (report.by, *COLUMNS)
    widths = [max(len(line[i]) for line in [head, *table]) for i in range(len(head))]
    lines = [heading(report), ""]
    for first, *rest in [head, *table]:
        texts = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *texts]))
    if len(report.rows) > top:
        rest_us = sum(row.us for row in report.rows[top:])
        lines.append(f"... {len(report.rows) - top} more rows, {rest_us * 1e-3:.3f} ms (--top shows them)")
    lines += ["", *(f"{what:<24}{ms:>12}{share:>9}" for what, ms, share in step_lines(report))]
    bound = report.bound_sentence()
    return "\n".join([*lines, *([bound] if bound else []), *(f"note: {note}" for note in report.notes)])


def heading(report: Report) -> str:
    """One line: the trace, the phase, the peaks behind the bounds."""
    d = report.device
    peaks = (
        f"bounds of {d.model}: {d.matrix_flops * 1e-12:g} TFLOP/s, {d.memory_bytes_per_s * 1e-9:g} GB/s" if d else ""
    )
    phase = "" if report.phase == "all" else f"{report.phase} only"
    return "; ".join(text for text in (report.source, phase, peaks if d and d.matrix_flops else "no bounds") if text)


def step_lines(report: Report) -> list[tuple[str, str, str]]:
    """The step: its time by kind of work, and the time with none. The parts less the overlap are the busy time."""
    usage, parts = report.step.usage, report.parts
    named = {OTHER: "other operators" if report.step.on_cpu else "other kernels", COPY: "copies and fills"}
    lines = [("step", usage.window)]
    lines += [(f"  {named.get(kind, kind)}", us) for kind, us in parts.items() if us or kind in (W4A16, ATTENTION)]
    if usage.overlap > 1e-3 * usage.window:
        lines.append(("  run at the same time", -usage.overlap))
    lines.append(("  outside operators" if report.step.on_cpu else "  idle GPU", usage.idle))
    whole = usage.window or 1.0
    return [(what, f"{us * 1e-3:.3f} ms", f"{100 * us / whole:.1f} %") for what, us in lines]


def as_csv(rows: Sequence[Row]) -> str:
    """Every figure of every row, unrounded; times in microseconds, shares as fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    derived = ("bound_us", "intensity", "tflops", "gb_per_s", "share_of_bound", "binds")
    names = [f.name for f in fields(Row)] + list(derived)
    writer.writerow(names)
    for row in rows:
        values = (getattr(row, name) for name in names)
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()
