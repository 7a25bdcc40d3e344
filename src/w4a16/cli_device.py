"""`w4a16 device`: measures this machine's peaks, beside the published ones. On the standard library and torch alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .device import Device, current_device, product_name, this_machine
from .errors import W4A16Error
from .roofline.measure import measure
from .roofline.peaks import GOLDEN, Peaks, file_of, save


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="w4a16 device", description="Measure this machine: copies, products, launches.")
    p.add_argument("--device", default=this_machine().type, help="cpu, cuda, cuda:1 ...")
    p.add_argument("--save", action="store_true", help="keep the figures as the bounds of roofline and bench")
    p.add_argument("--folder", type=Path, default=GOLDEN, help="where the golden files are")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    where = torch.device(options.device)
    try:
        device, peaks = current_device(where), measure(where)
        print(as_table(device, peaks))
        if options.save:
            path = file_of(product_name() if where.type == "cuda" else "cpu", options.folder)
            save(peaks, path)
            print(f"written to {path}")
    except W4A16Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def as_table(device: Device, peaks: Peaks) -> str:
    """Measured figures beside the published ones of `device`, a line each."""
    lines = [f"{peaks.machine} ({peaks.session})", "", f"{'':<28}{'measured':>12}{'published':>12}{'share':>8}"]
    published = device.memory_bytes_per_s * 1e-9
    pairs = [(f"memory, {name}, GB/s", rate * 1e-9, published) for name, rate in peaks.memory_bytes_per_s.items()]
    for act, flops in peaks.matrix_flops.items():
        known = device.matrix_flops if act != "fp32" else 0.0  # the published peaks are of 16-bit products
        pairs.append((f"torch.mm in {act}, TFLOP/s", flops * 1e-12, known * 1e-12))
    for name, value, known in pairs:
        share = f"{known:12.6g}{100 * value / known:6.1f} %" if known else f"{'-':>12}{'-':>8}"
        lines.append(f"{name:<28}{value:12.4g}{share}")
    launches = [("one launch, us", peaks.launch_us), ("a launch and waiting, us", peaks.round_trip_us)]
    if peaks.graph_us is not None:
        launches.append(("a small kernel in a graph, us", peaks.graph_us))
    return "\n".join([*lines, *(f"{name:<28}{value:12.3f}" for name, value in launches)])


if __name__ == "__main__":
    sys.exit(main())
