"""A torch profiler trace, CUDA, ROCm or CPU: its GPU kernels, the calls that launched them, and the ranges on the host.

Times are microseconds on the trace's own clock, as in the file.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadInput, explain_mismatch
from .attention import Attention, attention_of
from .chrome import ChromeTrace
from .labels import LAYER, Scope, parse
from .names import ATTENTION_OP
from .shapes import Gemm, is_product, product_of

Thread = tuple[Any, Any]  # process and thread of the host, or device and stream
OPERATORS = ("op", "product", "attention")
PHASES = ("prefill", "decode")
WARM_UP = "warm-up"  # a range whose kernels tell the problems of others, and are not of the step
_MODULE = "nn.Module: "


@dataclass(slots=True, eq=False)
class Span:
    """A time range on the host.

    role  scope, product, attention, op (any other operator), layer, phase, or range (any other annotation)
    what  the problem of a scope, product or attention, where the trace tells it
    """

    start: float
    end: float
    role: str
    name: str
    what: Scope | Gemm | Attention | None = None


@dataclass(slots=True, eq=False)
class Kernel:
    """One piece of work on a device, or a stretch of an operator's time on a CPU, `continued` after the first."""

    name: str
    start: float
    us: float
    lane: Thread
    correlation: int | None = None
    external: int | None = None
    grid: str = ""
    continued: bool = False

    @property
    def end(self) -> float:
        return self.start + self.us


@dataclass(slots=True)
class Launch:
    """A call of the CUDA or HIP runtime or driver."""

    at: float
    thread: Thread
    external: int | None
    graph: bool


@dataclass
class Trace:
    """What the report needs of one file."""

    path: Path
    kernels: list[Kernel] = field(default_factory=list)
    launches: dict[int, list[Launch]] = field(default_factory=lambda: defaultdict(list))
    spans: dict[Thread, list[Span]] = field(default_factory=lambda: defaultdict(list))
    device_spans: dict[Thread, list[Span]] = field(default_factory=lambda: defaultdict(list))
    flows: dict[tuple[Thread, float], int] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    on_rocm: bool = False
    repeated: int = 0  # kernels that the file holds twice


def read(path: Path) -> Trace:
    """Reads a trace as a stream. Raises BadInput for a damaged file and for one without any work in it."""
    trace, source = Trace(path=path), ChromeTrace(path)
    uncorrelated = False
    for event in source.events():
        category = event.get("cat")
        if category is None:
            continue
        try:
            if event.get("ph") == "X":
                _add(trace, event, category)
                uncorrelated = uncorrelated or (category == "kernel" and trace.kernels[-1].correlation is None)
            elif uncorrelated and category == "ac2g" and event.get("ph") == "f":
                # Some ROCm versions write no correlation into a kernel; an arrow from its launch follows it instead.
                trace.flows[((event["pid"], event["tid"]), float(event["ts"]))] = int(event["id"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            got = f"{type(error).__name__} ({error}) in {str(event)[:200]}"
            then = "Pass a trace as torch.profiler wrote it."
            raise BadInput(
                explain_mismatch(str(path), got=got, wanted="an event with finite ts and dur", then=then)
            ) from None
    devices = source.header.get("deviceProperties")
    trace.devices = [d for d in devices if isinstance(d, dict)] if isinstance(devices, list) else []
    _settle(trace)
    if not trace.kernels and not any(s.role in ("scope", *OPERATORS) for spans in trace.spans.values() for s in spans):
        then = "Record with activities=[CPU, CUDA] around the steps, and export after them."
        raise BadInput(explain_mismatch(str(path), got="no kernel and no operator", wanted="a recorded run", then=then))
    return trace


def _add(trace: Trace, event: dict[str, Any], category: str) -> None:
    """Files one complete event under its category; most categories are of no use here."""
    if category == "python_function" and not event["name"].startswith(_MODULE):
        return
    lane, start, us = (event["pid"], event["tid"]), float(event["ts"]), float(event.get("dur", 0))
    if not (math.isfinite(start) and math.isfinite(us) and us >= 0):
        raise ValueError("no time")
    arguments = event.get("args") or {}
    if category in ("kernel", "gpu_memcpy", "gpu_memset"):
        name = event["name"].removesuffix(" [clone .kd]").removesuffix(".kd")  # ROCm's kernel descriptors
        name = sys.intern(name if category == "kernel" else f"Mem{category[7:]}: {name}")
        trace.kernels.append(
            Kernel(
                name=name,
                start=start,
                us=us,
                lane=lane,
                correlation=_integer(arguments.get("correlation")),
                external=_integer(arguments.get("External id")),
                grid=sys.intern(f"{arguments.get('grid', '')}{arguments.get('block', '')}"),
            )
        )
    elif category.endswith(("_runtime", "_driver")):
        correlation = _integer(arguments.get("correlation"))
        if correlation is not None:
            name = event["name"]
            trace.on_rocm = trace.on_rocm or name.startswith("hip")
            external = _integer(arguments.get("External id"))
            launch = Launch(at=start, thread=lane, external=external, graph="GraphLaunch" in name)
            trace.launches[correlation].append(launch)
    elif category in ("cpu_op", "user_annotation", "python_function"):
        trace.spans[lane].append(_span(event["name"], category, start, start + us, arguments))
    elif category == "gpu_user_annotation" and (scope := parse(event["name"])) is not None:
        trace.device_spans[lane].append(
            Span(start=start, end=start + us, role="scope", name=sys.intern(event["name"]), what=scope)
        )


def _span(name: str, category: str, start: float, end: float, arguments: dict[str, Any]) -> Span:
    name = sys.intern(name)
    if category == "python_function":
        return Span(start, end, "layer", sys.intern(name.removeprefix(_MODULE)))
    if category == "user_annotation":
        scope = parse(name)
        if scope is not None:
            return Span(start, end, "scope", name, scope)
        if name.startswith(LAYER):
            return Span(start, end, "layer", sys.intern(name.removeprefix(LAYER)))
        return Span(start, end, "phase" if name in (*PHASES, WARM_UP) else "range", name)
    what = product_of(name, arguments)
    if what is not None or is_product(name):
        return Span(start, end, "product", name, what)
    if ATTENTION_OP.search(name):
        return Span(start, end, "attention", name, attention_of(name, arguments))
    return Span(start, end, "op", name)


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _settle(trace: Trace) -> None:
    """Orders everything by time, gives kernels without correlation that of their arrow, drops repeated kernels."""
    for spans in (*trace.spans.values(), *trace.device_spans.values()):
        spans.sort(key=lambda s: (s.start, -s.end))
    for kernel in trace.kernels:
        if kernel.correlation is None:
            kernel.correlation = trace.flows.get((kernel.lane, kernel.start))
    trace.kernels.sort(key=lambda k: (str(k.lane[0]), k.start))
    kept: list[Kernel] = []
    seen: set[tuple[str, Thread, int | None]] = set()
    for kernel in trace.kernels:
        if kept and kernel.start != kept[-1].start:
            seen.clear()
        key = (kernel.name, kernel.lane, kernel.correlation)
        if key not in seen:
            seen.add(key)
            kept.append(kernel)
    trace.repeated = len(trace.kernels) - len(kept)
    trace.kernels = kept


def launch_of(trace: Trace, kernel: Kernel) -> Launch | None:
    """The call that launched a kernel. Ids repeat across processes and wrap around: of several launches with the
    kernel's id, those of its operator come first, then the last one before it started."""
    found = trace.launches.get(kernel.correlation, []) if kernel.correlation is not None else []
    if len(found) > 1:
        found = [launch for launch in found if launch.external == kernel.external] or found
        found = [launch for launch in found if launch.at <= kernel.start] or found[:1]
    return max(found, key=lambda launch: launch.at, default=None)
