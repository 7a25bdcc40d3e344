"""The report as one HTML file: the step as a bar, a roofline scatter, a sortable table. It asks the network nothing."""

from __future__ import annotations

import html
import math
from importlib import resources
from string import Template

from .report import KINDS, Report, Row
from .tables import COLUMNS, cells, heading, step_lines

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 960, 480, 64, 44, 16, 24
_TEXT_COLUMNS = (0, len(COLUMNS))  # the name and what binds


def as_html(report: Report) -> str:
    """The whole page."""
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    texts = step_lines(report)
    heads = []
    for column, name in enumerate((report.by, *COLUMNS)):
        text = " data-text" if column in _TEXT_COLUMNS else ""
        order = ' aria-sort="descending"' if name == "ms" else ""
        heads.append(f'<th scope="col"{text}{order}><button type="button">{html.escape(name)}</button></th>')
    bar, key = _step_bar(report)
    return template.substitute(
        title=html.escape(f"w4a16 roofline: {report.source}"),
        heading=html.escape(heading(report)),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in filter(None, (report.bound_sentence(), *report.notes))),
        window=texts[0][1],
        bar=bar,
        key=key,
        scatter=_scatter(report),
        by=report.by,
        head="".join(heads),
        rows="\n".join(_table_row(number, row) for number, row in enumerate(report.rows)),
    )


def _color(kind: str) -> str:
    return f"k{KINDS.index(kind) if kind in KINDS else 0}"


def _table_row(number: int, row: Row) -> str:
    texts = cells(row)
    tds = [f'<td data-v="{html.escape(row.name)}"><i class="{_color(row.kind)}"></i>{html.escape(row.name)}</td>']
    for text in texts:
        plain = "" if text == "-" else html.escape(text)
        tds.append(f'<td data-v="{plain}">{plain or "-"}</td>')
    return f'<tr data-row="{number}">{"".join(tds)}</tr>'


def _step_bar(report: Report) -> tuple[str, str]:
    """The stacked bar, and its key."""
    whole = report.step.usage.window or 1.0
    bar, key = [], []
    colors = {f"  {kind}": _color(kind) for kind in KINDS}
    colors |= {"  other kernels": "k3", "  other operators": "k3", "  copies and fills": "k4"}
    for what, ms, share in step_lines(report)[1:]:
        color = colors.get(what, "idle")
        width = max(0.0, float(ms.split()[0]) * 1e3 / whole * 100)
        bar.append(
            f'<div class="{color}" style="width:{width:.3f}%" title="{html.escape(what.strip())}: {share}"></div>'
        )
        key.append(f'<span><i class="{color}"></i>{html.escape(what.strip())} {ms}, {share}</span>')
    return "".join(bar), "".join(key)


def _scatter(report: Report) -> str:
    """Attained FLOP/s against FLOP per byte, both logarithmic, as inline SVG."""
    points = [(i, row, row.intensity, row.tflops) for i, row in enumerate(report.rows)]
    known = [(i, row, x, y) for i, row, x, y in points if x and y]
    if not known:
        return "<p>No row has known FLOPs.</p>"
    xs, ys = [x for *_, x, _ in known], [y for *_, y in known]
    device = report.device if report.device is not None and report.device.matrix_flops else None
    if device is not None:
        peak, slope = device.matrix_flops * 1e-12, device.memory_bytes_per_s * 1e-12
        xs += [peak / slope * 4]
        ys += [peak]
    x0, x1, y0, y1 = min(xs) / 2, max(xs) * 2, min(ys) / 2, max(ys) * 2

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log10(x / x0) / math.log10(x1 / x0)
        up = math.log10(y / y0) / math.log10(y1 / y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="roofline: TFLOP/s against FLOP per byte">']
    for tick in _ticks(x0, x1):
        x, _ = at(tick, y0)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(y0, y1):
        _, y = at(x0, tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">FLOP per byte</text>')
    out.append(f'<text x="{LEFT + 6}" y="{TOP + 14}">TFLOP/s</text>')
    if device is not None:
        foot = max(x0, y0 / slope)
        corners = [(foot, foot * slope), (peak / slope, peak), (x1, peak)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*corner) for corner in corners))
        out.append(f'<polyline class="roof" points="{path}"/>')
    for number, row, px, py in sorted(known, key=lambda point: -point[1].share):
        x, y = at(px, py)
        told = f"{row.name}: {px:.1f} FLOP/B, {py:.2f} TFLOP/s, {100 * row.share:.1f} % of the step"
        if row.share_of_bound is not None:
            told += f", {100 * row.share_of_bound:.1f} % of its {row.binds} bound"
        radius = 4 + 26 * math.sqrt(row.share)
        out.append(
            f'<circle class="{_color(row.kind)}" data-row="{number}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
            f"<title>{html.escape(told)}</title></circle>"
        )
    return "\n".join([*out, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside the range; 1, 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(powers) > 4 else (1, 2, 5)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
