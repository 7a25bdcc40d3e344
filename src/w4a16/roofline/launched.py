"""The calls of a trace with GPU kernels: each kernel goes to the range or operator that launched it."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator

from .calls import Call, Context, call_of, context_of
from .labels import Scope
from .names import W4A16, kind_of
from .replays import alone, from_replays
from .trace import Kernel, Launch, Span, Thread, Trace, launch_of

NESTED = 8  # ranges that may lie inside each other


def from_kernels(trace: Trace) -> Iterator[Call]:
    launches = {id(kernel): launch_of(trace, kernel) for kernel in trace.kernels}
    contexts = _contexts(trace, {id(w): w for w in launches.values() if w is not None}.values())
    owned: dict[int, Call] = {}
    replayed: list[tuple[Launch, Kernel]] = []
    others: list[Call] = []
    for kernel in trace.kernels:
        launch = launches[id(kernel)]
        context = contexts[id(launch)] if launch is not None else Context(owner=_device_span(trace, kernel))
        if context.owner is not None:
            call = owned.get(id(context.owner))
            if call is None:
                call = owned[id(context.owner)] = call_of(context.owner, context)
            call.kernels.append(kernel)
            if call.kind == W4A16 and context.owner.role == "product" and kind_of(kernel.name).kind == W4A16:
                call.op = kind_of(kernel.name).op
        elif launch is not None and launch.graph:
            replayed.append((launch, kernel))
        else:
            others.append(alone(context, kernel))
    _mark_parts(trace, owned)
    yield from from_replays(replayed, contexts, [*owned.values(), *others])
    yield from owned.values()
    yield from others


def _device_span(trace: Trace, kernel: Kernel) -> Span | None:
    """The innermost range that the profiler copied to the kernel's stream, for kernels whose launch is not recorded."""
    spans = trace.device_spans.get(kernel.lane, [])
    at = bisect.bisect_right(spans, kernel.start, key=lambda s: s.start)
    return next((s for s in reversed(spans[max(0, at - NESTED) : at]) if s.end >= kernel.end), None)


def _contexts(trace: Trace, launches: Iterable[Launch]) -> dict[int, Context]:
    """The context of each launch, by its identity: one pass over each thread."""
    by_thread: dict[Thread, list[Launch]] = defaultdict(list)
    for launch in launches:
        by_thread[launch.thread].append(launch)
    found: dict[int, Context] = {}
    for thread, waiting in by_thread.items():
        spans, stack, at = trace.spans.get(thread, []), list[Span](), 0
        for launch in sorted(waiting, key=lambda w: w.at):
            while at < len(spans) and spans[at].start <= launch.at:
                stack = [s for s in stack if s.end >= spans[at].start]
                stack.append(spans[at])
                at += 1
            stack = [s for s in stack if s.end >= launch.at]
            found[id(launch)] = context_of(stack)
    return found


def _mark_parts(trace: Trace, owned: dict[int, Call]) -> None:
    """A range around other ranges keeps its time and leaves the FLOPs to them."""
    for spans in trace.spans.values():
        stack: list[Span] = []
        for span in spans:
            if isinstance(span.what, Scope):
                stack = [s for s in stack if s.end >= span.end]
                for outer in stack:
                    if id(outer) in owned:
                        owned[id(outer)].part = True
                stack.append(span)
