"""Call: one operation of a traced step, with its problem and what surrounded it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .attention import Attention
from .labels import Scope
from .names import ATTENTION, GEMM, W4A16
from .shapes import Gemm
from .trace import Kernel, Span

Work = Scope | Gemm | Attention  # what is known of an operation: its shape, cost() and activation dtype
CLAIMS = ("scope", "attention", "product")  # spans that own all that happens inside them


@dataclass(slots=True, eq=False)
class Call:
    """One operation of the step.

    what  its problem, None where the trace does not tell
    name  of the operator, on a CPU
    part  the rest of a call whose inner ranges are calls of their own: it has time, but no FLOPs of its own
    """

    kind: str
    op: str
    what: Work | None
    layer: str | None
    phase: str | None
    kernels: list[Kernel] = field(default_factory=list)
    inferred: bool = False
    part: bool = False
    name: str = ""

    @property
    def us(self) -> float:
        return sum(kernel.us for kernel in self.kernels)

    @property
    def rows(self) -> int | None:
        """M, where it is known."""
        if isinstance(self.what, Scope):
            return self.what.problem.m
        return self.what.m if isinstance(self.what, Gemm) and self.what.batch == 1 else None


@dataclass(slots=True)
class Context:
    """What surrounds a moment on a host thread."""

    owner: Span | None = None  # the scope, attention or product that what happens here belongs to
    layer: str | None = None
    phase: str | None = None


def context_of(stack: Iterable[Span]) -> Context:
    """The context that a stack of open spans makes, outermost first: the innermost scope, else the outermost of
    attention and products."""
    context = Context()
    modules: list[str] = []
    for span in stack:
        if span.role == "layer":
            modules.append(span.name)
        elif span.role == "phase":
            context.phase = span.name
        elif span.role == "scope" or (span.role in CLAIMS and context.owner is None):
            context.owner = span
    if modules:
        # Dotted names are whole paths; a profiler's own module ranges name only the class and its number.
        context.layer = modules[-1] if "." in modules[-1] else " > ".join(modules[-2:])
    return context


def call_of(owner: Span, context: Context) -> Call:
    """An empty call of a scope, product or attention."""
    kind, op = GEMM, "gemm"
    if owner.role == "attention":
        kind, op = ATTENTION, "attention"
    elif isinstance(owner.what, Scope):
        kind, op = W4A16, owner.what.stem
    return Call(kind=kind, op=op, what=owner.what, layer=context.layer, phase=context.phase)
