"""`w4a16 roofline`: a profiler trace in, each operation against its bound out. On the standard library alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..device import DEVICES, Device, known_device, of_product, product_name
from ..errors import BadInput, W4A16Error, explain_mismatch
from .page import as_html
from .peaks import GOLDEN, measured
from .picture import write_png
from .report import BY, make_report
from .step import step_of
from .tables import as_csv, as_table
from .trace import Trace, read


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="w4a16 roofline", description="How far each operation of a trace is from its bound."
    )
    p.add_argument("trace", type=Path, help="a torch profiler trace, .json or .json.gz")
    p.add_argument("--by", default="op", choices=BY, help="what makes a row")
    p.add_argument("--phase", default="all", choices=("prefill", "decode", "all"), help="decode: up to 16 rows a call")
    p.add_argument("--device", help=f"whose published peaks; default: the trace's device. {', '.join(DEVICES)}")
    p.add_argument("--peaks", help="peaks in place of these: TFLOPS,GB/S")
    p.add_argument("--golden", type=Path, default=GOLDEN, help="where `w4a16 device --save` keeps measured peaks")
    p.add_argument("--top", type=int, default=40, help="rows to print; the files have them all")
    for name in ("csv", "html", "png"):
        p.add_argument(f"--{name}", type=Path, help="also write this file")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        trace = read(options.trace)
        named = known_device(options.device) if options.device else bounds_of(trace, options.golden)
        device = _with_peaks(named, options.peaks)
        report = make_report(trace, step_of(trace), device, by=options.by, phase=options.phase)
        print(as_table(report, options.top))
        if options.csv is not None:
            options.csv.write_text(as_csv(report.rows))
        if options.html is not None:
            options.html.write_text(as_html(report), encoding="utf-8")
        if options.png is not None:
            write_png(report, options.png)
    except W4A16Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def device_of(trace: Trace) -> Device | None:
    """The device that a trace names, where w4a16 knows it."""
    if not trace.kernels:
        return DEVICES["cpu"]
    if not trace.devices:
        return None
    facts = trace.devices[0]
    major, minor, units = (facts.get(name, 0) for name in ("computeMajor", "computeMinor", "numSms"))
    if not trace.on_rocm:
        device = DEVICES.get(f"sm{major}{minor}")
        return device and of_product(device, str(facts.get("name", "")))
    found = [d for arch, d in DEVICES.items() if arch[:-1] == f"gfx{major}{minor}"]  # the stepping is not recorded
    if len(found) > 1:  # gfx1100 or gfx1101: HIP counts either CUs or pairs of them
        found = [d for d in found if d.compute_units in (units, 2 * units)]
    return found[0] if found else None


def bounds_of(trace: Trace, golden: Path = GOLDEN) -> Device | None:
    """The device that a trace names, with the peaks that were measured on such a one, where they are kept."""
    device = device_of(trace)
    if device is None or not trace.kernels:
        return device and measured(device, "cpu", golden)
    return measured(device, product_name(str(trace.devices[0].get("name", "unnamed"))), golden)


def _with_peaks(device: Device | None, peaks: str | None) -> Device | None:
    if peaks is None:
        return device
    try:
        tflops, gb_s = map(float, peaks.split(","))
    except ValueError:
        then = "Give two numbers with a comma: --peaks 989,3350."
        raise BadInput(explain_mismatch("--peaks", got=peaks, wanted="TFLOPS,GB/S", then=then)) from None
    base = device or DEVICES["cpu"]
    return replace(base, matrix_flops=tflops * 1e12, memory_bytes_per_s=gb_s * 1e9, model="the given peaks")
