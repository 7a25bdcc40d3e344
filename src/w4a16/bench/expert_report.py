"""The benchmark of expert layers as rows of text, and for a plain terminal."""

from __future__ import annotations

from collections.abc import Sequence

from .expert_run import ExpertResult

COLUMNS = (
    *("shape", "E", "top_k", "H", "I", "group", "routing", "tokens", "act", "zeros", "provider", "kernel"),
    *(
        "us",
        "GEMMs us",
        "spread %",
        "TFLOP/s",
        "weight GB/s",
        "touched",
        "padding %",
        "x grouped_mm",
        "% bound",
        "error",
    ),
)
Place = tuple[str, str, int]


def rows(results: Sequence[ExpertResult]) -> list[tuple[str, ...]]:
    """One row of text a result, in the order of COLUMNS; `x grouped_mm` is its time over this time."""
    dense = {(r.shape, r.routing, r.problem): r.seconds for r in results if r.provider == "grouped_mm"}
    found = []
    for r in results:
        base, p, s = dense.get((r.shape, r.routing, r.problem)), r.problem, r.shape
        sizes = [str(size) for size in (s.experts, s.top_k, s.hidden, s.inter, s.group)]
        what = [r.routing, str(p.m), p.act, "asym" if p.has_zeros else "sym", r.provider, r.kernel]
        alone = "" if r.gemm_seconds is None else f"{r.gemm_seconds * 1e6:.2f}"
        speed = [f"{r.seconds * 1e6:.2f}", alone, f"{r.spread_percent:.1f}", f"{r.tflops:.2f}", f"{r.gb_per_s:.0f}"]
        waste = [str(r.work.touched), "" if r.padding is None else f"{100 * r.padding:.1f}"]
        share = f"{100 * r.bound_seconds / r.seconds:.1f}" if r.bound_seconds else ""
        ratio = [f"{base / r.seconds:.3f}" if base else "", share]
        found.append((s.name, *sizes, *what, *speed, *waste, *ratio, f"{r.error:.1e}"))
    return found


def compact(results: Sequence[ExpertResult]) -> str:
    """One line a layer, routing and number of tokens: microseconds of each provider, whole layer / its GEMMs alone."""
    names = list(dict.fromkeys(r.provider for r in results))
    points: dict[Place, dict[str, ExpertResult]] = {}
    for r in results:
        points.setdefault((r.shape.name, r.routing, r.problem.m), {})[r.provider] = r
    lines = [f"{'shape':<20}{'routing':<10}{'tokens':>6}" + "".join(f"{name[:18]:>20}" for name in names) + "  padding"]
    for (shape, routing, tokens), at in points.items():
        times = "".join(f"{_times(at[name]) if name in at else '-':>20}" for name in names)
        waste = [f"{100 * r.padding:.0f} %" for r in at.values() if r.padding is not None]
        lines.append(f"{shape:<20}{routing:<10}{tokens:>6}{times}  {' '.join(waste):>7}")
    return "\n".join(lines)


def _times(r: ExpertResult) -> str:
    alone = "-" if r.gemm_seconds is None else f"{r.gemm_seconds * 1e6:.1f}"
    return f"{r.seconds * 1e6:.1f} / {alone}"
