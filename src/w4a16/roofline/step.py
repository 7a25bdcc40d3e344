"""The step of a trace: its calls, their phases, and how the devices' time was spent."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .calls import Call
from .launched import from_kernels
from .names import GEMM, W4A16
from .operators import from_operators
from .trace import PHASES, WARM_UP, Trace

DECODE_ROWS = 16  # up to this many rows a call counts as decode


@dataclass(slots=True)
class Usage:
    """How the devices' time was spent: in a kernel, with none running, and what two at once took twice."""

    busy: float = 0.0
    idle: float = 0.0
    overlap: float = 0.0

    @property
    def window(self) -> float:
        return self.busy + self.idle


@dataclass
class Step:
    """All calls of a trace and the devices' time, whole or of one phase."""

    calls: list[Call]
    usage: Usage
    on_cpu: bool

    def of_phase(self, phase: str) -> Step:
        """The calls of one phase, with the idle time before them."""
        usage: dict[str, Usage] = _usage(self.calls)
        return Step([c for c in self.calls if c.phase == phase], usage.get(phase, Usage()), self.on_cpu)


def step_of(trace: Trace) -> Step:
    """Every call of the trace: from its kernels, or from its operators where it has no kernel."""
    found = from_kernels(trace) if trace.kernels else from_operators(trace)
    calls = [call for call in found if call.phase != WARM_UP]
    calls.sort(key=lambda c: c.kernels[0].start)
    _set_phases(calls)
    total = Usage()
    for usage in _usage(calls).values():
        total.busy += usage.busy
        total.idle += usage.idle
        total.overlap += usage.overlap
    return Step(calls, total, on_cpu=not trace.kernels)


def _set_phases(calls: list[Call]) -> None:
    """Gives every call a phase: that of a range named `prefill` or `decode` around it, else by its own rows, else that
    of the call before it. W4A16 calls decide where there are any: of a prompt, the last layer takes one row."""
    kind = W4A16 if any(c.kind == W4A16 and c.rows is not None for c in calls) else GEMM
    first: str | None = None
    now: str | None = None
    waiting: list[Call] = []
    for call in calls:
        if call.phase not in PHASES and call.kind == kind and call.rows is not None:
            call.phase = "decode" if call.rows <= DECODE_ROWS else "prefill"
        now = call.phase or now
        first = first or now
        if now is None:
            waiting.append(call)
        call.phase = call.phase or now
    for call in waiting:
        call.phase = first


def _usage(calls: list[Call]) -> dict[str, Usage]:
    """Time of each phase ("" where there is none); a device is idle before a kernel in that kernel's phase."""
    order = sorted(((k, c.phase or "") for c in calls for k in c.kernels), key=lambda at: at[0].start)
    ends: dict[object, float] = {}
    usage: dict[str, Usage] = defaultdict(Usage)
    for kernel, phase in order:
        device = kernel.lane[0]
        before = ends.get(device, kernel.start)
        usage[phase].idle += max(0.0, kernel.start - before)
        fresh = max(0.0, kernel.end - max(before, kernel.start))
        usage[phase].busy += fresh
        usage[phase].overlap += kernel.us - fresh
        ends[device] = max(before, kernel.end)
    return usage
