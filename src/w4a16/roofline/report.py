"""Calls against their bounds: rows by op, shape, kernel or layer, then the step as a whole."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from ..device import Device
from ..errors import BadInput, explain_mismatch
from .calls import Call
from .labels import Scope
from .names import ATTENTION, COPY, GEMM, OTHER, W4A16, short
from .step import Step
from .trace import Trace

KINDS = (W4A16, GEMM, ATTENTION, OTHER, COPY)
BY = ("op", "shape", "kernel", "layer")


@dataclass(kw_only=True)
class Row:
    """A group of calls. FLOPs, bytes and bounds are sums over the `known_calls` whose problem is known, in `known_us`.

    executed_flops counts the padding of expert blocks too.
    """

    name: str
    kind: str
    calls: int = 0
    us: float = 0.0
    share: float = 0.0
    known_calls: int = 0
    known_us: float = 0.0
    flops: int = 0
    executed_flops: int = 0
    bytes: int = 0
    compute_us: float = 0.0
    memory_us: float = 0.0
    inferred: int = 0

    @property
    def bound_us(self) -> float:
        return self.compute_us + self.memory_us

    @property
    def intensity(self) -> float | None:
        return self.flops / self.bytes if self.bytes else None

    @property
    def tflops(self) -> float | None:
        return self.flops / self.known_us * 1e-6 if self.known_us else None

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.known_us * 1e-3 if self.known_us else None

    @property
    def share_of_bound(self) -> float | None:
        return self.bound_us / self.known_us if self.known_us and self.bound_us else None

    @property
    def binds(self) -> str:
        """`compute` or `memory`, whichever takes more of the bound."""
        return "" if not self.bound_us else "compute" if self.compute_us > self.memory_us else "memory"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is printed: the rows, the step, and where both come from."""

    source: str
    device: Device | None
    by: str
    phase: str
    rows: list[Row]
    step: Step
    notes: list[str]

    @property
    def parts(self) -> dict[str, float]:
        """Microseconds of the step by kind of work."""
        totals = dict.fromkeys(KINDS, 0.0)
        for call in self.step.calls:
            totals[call.kind] += call.us
        return totals

    def bound_sentence(self) -> str:
        """How far what is known of the step is from its bounds; "" where there are none."""
        bound, known = sum(row.bound_us for row in self.rows), sum(row.known_us for row in self.rows)
        whole = self.step.usage.window
        if not bound or not whole:
            return ""
        return (
            f"the bounds add up to {bound * 1e-3:.3f} ms: {100 * bound / known:.1f} % of the {known * 1e-3:.3f} ms of "
            f"operations whose problem is known, {100 * bound / whole:.1f} % of the step"
        )


def make_report(trace: Trace, step: Step, device: Device | None, *, by: str = "op", phase: str = "all") -> Report:
    """Groups the calls of a step. Raises BadInput when the trace cannot be grouped or cut as asked."""
    if phase != "all":
        phases = sorted({call.phase for call in step.calls if call.phase})
        step = step.of_phase(phase)
        if not step.calls:
            got = f"a trace with {' and '.join(phases) or 'no call whose rows are known'}"
            then = "Leave --phase out, or record with W4A16_PROFILE=1 or record_shapes=True."
            raise BadInput(explain_mismatch("--phase", got=got, wanted=phase, then=then))
    if by == "layer" and not any(call.layer for call in step.calls):
        then = "Record inside w4a16.roofline.scopes.layers(model), or with with_stack=True and with_modules=True."
        raise BadInput(explain_mismatch("--by layer", got="no module ranges", wanted="`layer ...` ranges", then=then))
    groups: dict[tuple[str, str], Row] = {}
    for call in step.calls:
        _add(groups, call, by, device)
    rows = sorted(groups.values(), key=lambda row: -row.us)
    for row in rows:
        row.share = row.us / step.usage.window if step.usage.window else 0.0
    return Report(
        source=f"{trace.path.name}: {'CPU' if step.on_cpu else _gpus(trace)}",
        device=device,
        by=by,
        phase=phase,
        rows=rows,
        step=step,
        notes=_notes(trace, step, device),
    )


def _gpus(trace: Trace) -> str:
    """The devices that ran kernels, as the trace names them."""
    used = {kernel.lane[0] for kernel in trace.kernels}
    names = Counter(str(d.get("name")) for d in trace.devices if d.get("id") in used)
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in names.items()) or "unnamed GPU"


def _add(groups: dict[tuple[str, str], Row], call: Call, by: str, device: Device | None) -> None:
    if by == "kernel":
        rows: dict[str, Row] = {}
        for kernel in call.kernels:
            row = rows[kernel.name] = _row(groups, short(kernel.name), call.kind)
            row.us += kernel.us
            row.calls += not kernel.continued
        if len(rows) == 1:  # what several kernels do together is no single one's
            _count(row, call, device)
        return
    name = call.op
    if by == "shape":
        if call.what is not None or call.kind in (W4A16, GEMM):
            name = f"{call.op} {call.what.shape if call.what is not None else '?'}"
    elif by == "layer":
        name = call.layer or "(no layer)"
    row = _row(groups, name + (" (rest)" if call.part and by != "layer" else ""), "" if by == "layer" else call.kind)
    row.calls += 1
    row.us += call.us
    _count(row, call, device)


def _row(groups: dict[tuple[str, str], Row], name: str, kind: str) -> Row:
    return groups.setdefault((name, kind), Row(name=name, kind=kind))


def _count(row: Row, call: Call, device: Device | None) -> None:
    """Adds the FLOPs, bytes and bound of a call whose problem is known."""
    if call.what is None or call.part:
        return
    cost = call.what.cost()
    row.known_calls += 1
    row.known_us += call.us
    row.inferred += call.inferred
    row.flops += cost.flops
    row.bytes += cost.bytes
    padding = 1.0
    if isinstance(call.what, Scope) and (routing := call.what.routing()) is not None and routing.slots:
        padding = routing.rows / routing.slots
    row.executed_flops += round(cost.flops * padding)
    if device is not None:
        seconds, binds = cost.bound(device, call.what.act)
        row.compute_us += seconds * 1e6 if binds == "compute" else 0.0
        row.memory_us += seconds * 1e6 if binds == "memory" else 0.0


def _notes(trace: Trace, step: Step, device: Device | None) -> list[str]:
    """What a reader has to know to trust the numbers."""
    notes = []
    inferred = sum(call.inferred for call in step.calls)
    shapeless = sum(call.what is None for call in step.calls if call.kind in (W4A16, GEMM))
    if inferred:
        notes.append(f"{inferred} calls in graph replays took the problem of the same kernel and grid run eagerly.")
    if shapeless:
        notes.append(
            f"{shapeless} products have no known shape, so no bound: record with W4A16_PROFILE=1, record_shapes=True."
        )
    if trace.repeated:
        notes.append(f"{trace.repeated} kernels are in the file twice and were counted once.")
    named = [word for word in re.split(r"[\s-]+", device.model.lower()) if re.search(r"\d", word)] if device else []
    if device and named and not step.on_cpu and not any(word in _gpus(trace).lower() for word in named):
        notes.append(f"The trace is of {_gpus(trace)}, the bounds of {device.model}: give --device or --peaks.")
    if device is None or not device.matrix_flops:
        notes.append("No bounds: the device's peaks are unknown. Name one with --device, or give --peaks TFLOPS,GB/S.")
    if any(isinstance(c.what, Scope) and c.what.problem.experts and not c.what.facts for c in step.calls):
        notes.append(
            "Experts were not counted in some calls; those count as many as there are slots, the most possible."
        )
    return notes
