"""A benchmark's results as a table, Markdown, CSV, JSON, and a picture of TFLOP/s against M under the roofline."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from ..device import Device
from ..errors import BadInput
from ..roofline.model import bound_seconds, flops
from .expert_run import ExpertRefusal
from .run import Refusal, Result

COLUMNS = (
    *("shape", "N", "K", "group", "M", "act", "zeros", "provider", "kernel"),
    *("us", "spread %", "TFLOP/s", "GB/s", "x cublas", "% bound", "error"),
)


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """One row of text a result, in the order of COLUMNS; `x cublas` is cuBLAS time over this time."""
    blas = {(r.shape, r.problem): r.seconds for r in results if r.provider == "cublas"}
    found = []
    for r in results:
        base = blas.get((r.shape, r.problem))
        p = r.problem
        sizes = [
            r.shape.name,
            *(str(size) for size in (p.n, p.k, p.group, p.m)),
            p.act,
            "asym" if p.has_zeros else "sym",
        ]
        speed = [f"{r.seconds * 1e6:.2f}", f"{r.spread_percent:.1f}", f"{r.tflops:.2f}", f"{r.gb_per_s:.0f}"]
        ratio = [f"{base / r.seconds:.3f}" if base else "", f"{100 * r.share_of_bound:.1f}" if r.bound_seconds else ""]
        found.append((*sizes, r.provider, r.kernel, *speed, *ratio, f"{r.error:.1e}"))
    return found


def as_markdown(columns: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return "\n".join(f"| {line} |" for line in lines + [" | ".join(row) for row in table]) + "\n"


def as_csv(columns: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *table])
    return text.getvalue()


def as_json(columns: Sequence[str], table: Sequence[Sequence[str]], refusals: Sequence[Refusal | ExpertRefusal]) -> str:
    points = [dict(zip(columns, row, strict=True)) for row in table]
    refused = [{"shape": r.shape.name, "M": r.problem.m, "provider": r.provider, "why": r.sentence} for r in refusals]
    return json.dumps({"results": points, "refused": refused}, indent=1) + "\n"


def compact(results: Sequence[Result]) -> str:
    """One line a shape and M: microseconds of each provider, then each one's ratio to cuBLAS. For a plain terminal."""
    names = list(dict.fromkeys(r.provider for r in results))
    points: dict[tuple[str, int], dict[str, Result]] = {}
    for r in results:
        points.setdefault((r.shape.name, r.problem.m), {})[r.provider] = r
    lines = [f"{'shape':<20}{'M':>6}" + "".join(f"{name[:14]:>15}" for name in names) + "   cublas/each"]
    for (shape, m), at in points.items():
        times = "".join(f"{at[n].seconds * 1e6:15.1f}" if n in at else f"{'-':>15}" for n in names)
        base = at.get("cublas")
        ratios = " ".join(f"{base.seconds / at[n].seconds:5.2f}" if base and n in at else "    -" for n in names)
        lines.append(f"{shape:<20}{m:>6}{times}   {ratios}")
    return "\n".join(lines)


def write_png(results: Sequence[Result], device: Device, path: Path) -> None:
    """TFLOP/s against M of every shape, one panel each, under the bound of `device`. Needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise BadInput("--png: got no matplotlib, wanted it installed: pip install 'w4a16[bench]'.") from None
    shapes = list(dict.fromkeys(r.shape for r in results))
    figure, panels = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        here = [r for r in results if r.shape == shape]
        for name in dict.fromkeys(r.provider for r in here):
            line = [(r.problem.m, r.tflops) for r in here if r.provider == name]
            panel.plot(*zip(*line, strict=True), marker="o", label=name)
        if device.matrix_flops:
            problems = sorted({r.problem for r in here}, key=lambda p: p.m)
            roof = [flops(p) / bound_seconds(p, device) * 1e-12 for p in problems]
            panel.plot([p.m for p in problems], roof, color="black", linestyle="--", label="roofline")
        panel.set(xscale="log", yscale="log", xlabel="M", ylabel="TFLOP/s", title=f"{shape.name} {shape.n}x{shape.k}")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
