"""The golden files of a device as the README's tables: `w4a16 golden table --product h100 --readme README.md`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from ..device import Device
from ..errors import BadInput, explain_mismatch
from ..problem import Problem
from ..roofline.model import bound_seconds
from .cases import MODELS, Shape
from .expert_cases import TOKENS
from .golden import Row
from .report import as_markdown

SHOWN = TOKENS  # row counts, too
_KINDS = (("bf16", 1), ("fp16", 0), ("fp16", 1))  # beside bf16 symmetric, which the tables show


def linear_table(rows: Iterable[Row], device: Device | None) -> str:
    """Microseconds of each layer at SHOWN row counts, bf16 and symmetric; in brackets the share of the bound."""
    us = {row.key: row.median_us for row in rows}
    shapes = {shape.name: shape for layers in MODELS.values() for shape in layers}
    lines = []
    for name in dict.fromkeys(case for case, *_ in us if case in shapes):
        shape = shapes[name]
        cells = [_cell(shape, m, us.get((name, m, "bf16", 0)), device) for m in SHOWN]
        lines.append((name, f"{shape.n}x{shape.k}", str(shape.group), *cells))
    return as_markdown(("layer", "NxK", "group", *(f"M={m}" for m in SHOWN)), lines)


def experts_table(rows: Iterable[Row]) -> str:
    """Microseconds of each expert layer, bf16 and symmetric, by routing, at SHOWN tokens."""
    us = {row.key: row.median_us for row in rows}
    lines = []
    for case in dict.fromkeys(case for case, *_ in us):
        model, _, routing = case.rpartition(".")
        lines.append((model, routing, *(_us(us.get((case, tokens, "bf16", 0))) for tokens in SHOWN)))
    return as_markdown(("experts", "routing", *map(str, SHOWN)), lines)


def other_kinds(rows: Iterable[Row]) -> str:
    """One line: the geometric mean of each other kind's time over bf16 symmetric, decode and prefill apart."""
    us = {row.key: row.median_us for row in rows}
    found = []
    for act, zero_point in _KINDS:
        name = f"{act} {'asymmetric' if zero_point else 'symmetric'}"
        ratios: dict[bool, list[float]] = {True: [], False: []}
        for case, m, kind, zeros in us:
            if (kind, zeros) == ("bf16", 0) and (case, m, act, zero_point) in us:
                ratios[m <= 16].append(us[case, m, act, zero_point] / us[case, m, "bf16", 0])
        if all(ratios.values()):
            decode, prefill = (math.exp(sum(map(math.log, each)) / len(each)) for each in ratios.values())
            found.append(f"{name} {decode:.2f} to 16 rows and {prefill:.2f} beyond")
    return f"Times bf16 symmetric, geometric means: {'; '.join(found)}.\n" if found else ""


def write_between(path: Path, product: str, text: str) -> None:
    """Replaces what stands between the file's two markers of `product`. Raises BadInput where one is missing."""
    begin, end = f"<!-- golden {product} -->\n", f"<!-- end of golden {product} -->\n"
    whole = path.read_text(encoding="utf-8")
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        wanted = f"{begin.strip()} and {end.strip()}"
        raise BadInput(explain_mismatch(str(path), got="no such markers", wanted=wanted, then="Add these two lines."))
    path.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


def _cell(shape: Shape, m: int, us: float | None, device: Device | None) -> str:
    if us is None or device is None:
        return _us(us)
    bound = bound_seconds(Problem(m=m, n=shape.n, k=shape.k, group=shape.group), device)
    return f"{_us(us)} ({1e8 * bound / us:.0f} %)"


def _us(us: float | None) -> str:
    return "" if us is None else f"{us:.3g}" if us < 1000 else f"{us:.0f}"
