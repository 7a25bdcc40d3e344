"""The calls of a trace without GPU kernels: the operators of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

from .calls import CLAIMS, Call, call_of, context_of
from .names import OTHER, W4A16, Kind, kind_of
from .trace import OPERATORS, Kernel, Span, Thread, Trace

_SAME = 1e-2  # microseconds: closer times are one moment, rounded


def from_operators(trace: Trace) -> Iterator[Call]:
    """Calls of a CPU trace: the time of each outermost operator, less that of ranges and products inside it.

    Takes the trace's spans as it goes: of a large trace, spans and calls do not fit in memory together.
    """
    while trace.spans:
        thread, spans = trace.spans.popitem()
        yield from _of_thread(thread, spans)


def _of_thread(thread: Thread, spans: list[Span]) -> Iterator[Call]:
    stack: list[tuple[Span, Call | None]] = []
    now = 0.0
    spans.reverse()
    while spans or stack:
        until = spans[-1].start if spans else float("inf")
        while stack and stack[-1][0].end <= until:
            top, call = stack.pop()
            _stretch(call, thread, now, top.end)
            now = max(now, top.end)
            if call is not None and call.kernels and not any(other is call for _, other in stack):
                yield call
        if spans:
            if stack:
                _stretch(stack[-1][1], thread, now, until)
            now = max(now, until)
            span = spans.pop()
            stack.append((span, _call(span, stack)))


def _call(span: Span, stack: list[tuple[Span, Call | None]]) -> Call | None:
    """The call that an operator's time goes to: its own, or that of what it is inside."""
    outer = stack[-1][1] if stack else None
    claimed = next((call for s, call in stack if s.role in CLAIMS and call is not None), None)
    if span.role == "scope" or (claimed is None and span.role in ("attention", "product")):
        if claimed is not None and claimed.kind == W4A16:
            claimed.part = True
        call = call_of(span, context_of(s for s, _ in stack))
        call.name = call.op if call.kind == W4A16 else span.name
        return call
    if claimed is not None or span.role not in OPERATORS:
        return outer
    kind = kind_of(span.name)
    if kind.kind != W4A16:
        if outer is not None:
            return outer
        kind = Kind(kind=OTHER, op="other")
    context = context_of(s for s, _ in stack)
    return Call(kind.kind, kind.op, None, context.layer, context.phase, name=span.name)


def _stretch(call: Call | None, thread: Thread, start: float, end: float) -> None:
    """Gives a call the time from `start` to `end`."""
    if call is None or end <= start:
        return
    last = call.kernels[-1] if call.kernels else None
    if last is not None and abs(last.end - start) < _SAME:
        last.us = end - last.start
    else:
        call.kernels.append(Kernel(call.name, start, end - start, thread, continued=last is not None))
