"""The roofline as a PNG. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from ..errors import BadInput
from .report import Report


def write_png(report: Report, path: Path) -> None:
    """Attained FLOP/s against intensity, one point a row, its area its time, under the roof of the device."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise BadInput("--png: got no matplotlib, wanted it installed: pip install 'w4a16[bench]'.") from None
    figure, panel = plt.subplots(figsize=(9, 6))
    points = [row for row in report.rows if row.intensity and row.tflops]
    for row in points:
        panel.scatter(row.intensity, row.tflops, s=20 + 2000 * row.share, alpha=0.6, label=row.name)
    if report.device is not None and report.device.matrix_flops:
        peak, bandwidth = report.device.matrix_flops, report.device.memory_bytes_per_s
        ridge = peak / bandwidth
        ends = sorted([ridge, *(row.intensity or ridge for row in points), ridge * 10, ridge / 1000])
        panel.plot(ends, [min(peak, x * bandwidth) * 1e-12 for x in ends], color="black", linestyle="--")
    panel.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=report.source)
    if points:
        for handle in panel.legend(fontsize="small", loc="lower right").legend_handles:
            handle.set_sizes([40])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
