"""The calls of a replayed CUDA graph, which opens no range: found by what ran eagerly in the same trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from .calls import Call, Context, Work
from .labels import Scope
from .names import COPY, kind_of
from .trace import Kernel, Launch

Key = tuple[str, str]  # a kernel's name and grid
Problem = tuple[str, str, Work | None]  # a kind, an op and what it did


def from_replays(
    replayed: Iterable[tuple[Launch, Kernel]], contexts: Mapping[int, Context], eager: Iterable[Call]
) -> Iterator[Call]:
    """Calls of kernels that graph launches ran.

    A replay whose kernels are, name by name and grid by grid, those of a stretch that ran eagerly takes its calls.
    Else a kernel takes the problem under which the same kernel with the same grid ran eagerly, where that is one only.
    """
    launches: dict[int, list[Kernel]] = defaultdict(list)
    by_id: dict[int, Launch] = {}
    for launch, kernel in replayed:
        launches[id(launch)].append(kernel)
        by_id[id(launch)] = launch
    if not launches:
        return
    stretches, problems = _Stretches(eager := list(eager)), _Problems(eager)
    for launch_id, kernels in launches.items():
        context = contexts[launch_id]
        fills = [kernel for kernel in kernels if _is_fill(kernel)]
        yield from (alone(context, kernel) for kernel in fills)
        kernels = sorted((k for k in kernels if not _is_fill(k)), key=lambda kernel: kernel.start)
        found = stretches.find(kernels)
        yield from problems.calls(kernels, context) if found is None else _alike(kernels, found, context)


def alone(context: Context, kernel: Kernel) -> Call:
    """A kernel that no range or operator of interest launched: known by its name at best."""
    kind = kind_of(kernel.name)
    return Call(kind=kind.kind, op=kind.op, what=None, layer=context.layer, phase=context.phase, kernels=[kernel])


def _alike(kernels: list[Kernel], models: list[Call], context: Context) -> Iterator[Call]:
    """One call for each call that the kernels' counterparts were of."""
    calls: dict[int, Call] = {}
    for kernel, model in zip(kernels, models, strict=True):
        call = calls.get(id(model))
        if call is None:
            layer = context.layer or model.layer
            call = calls[id(model)] = Call(model.kind, model.op, model.what, layer, context.phase, inferred=True)
            call.part = model.part
        call.kernels.append(kernel)
    yield from calls.values()


class _Stretches:
    """Finds a run of kernels among the eager ones: each (name, grid) is a character, so that str.find does it."""

    def __init__(self, eager: list[Call]):
        ran = sorted(((k, c) for c in eager for k in c.kernels if not _is_fill(k)), key=lambda pair: pair[0].start)
        self.letters: dict[Key, str] = {}
        self.calls = [call for _, call in ran]
        self.text = "".join(self.letters.setdefault(_key(k), chr(len(self.letters))) for k, _ in ran)
        self.known: dict[str, int | None] = {}

    def find(self, kernels: list[Kernel]) -> list[Call] | None:
        """The eager calls of the kernels' counterparts; None where there are none, or several that did other work."""
        word = "".join(self.letters.get(_key(k), "") for k in kernels)
        if len(word) != len(kernels):
            return None
        if word not in self.known:
            self.known[word] = self._search(word)
        at = self.known[word]
        return None if at is None else self.calls[at : at + len(word)]

    def _search(self, word: str) -> int | None:
        first = at = self.text.find(word)
        while at >= 0:
            if at != first and self._work(at, len(word)) != self._work(first, len(word)):
                return None
            at = self.text.find(word, at + len(word))
        return None if first < 0 else first

    def _work(self, at: int, length: int) -> list[Problem]:
        return [_problem(call) for call in self.calls[at : at + length]]


class _Problems:
    """The problem of a single kernel, by its name and grid."""

    def __init__(self, eager: list[Call]):
        self.known: dict[Key, set[Problem]] = defaultdict(set)
        self.first = {_key(call.kernels[0]) for call in eager if call.what is not None}
        for call in eager:
            for kernel in call.kernels:
                self.known[_key(kernel)].add(_problem(call))

    def calls(self, kernels: list[Kernel], context: Context) -> Iterator[Call]:
        open_calls: dict[Problem, Call] = {}
        for kernel in kernels:
            problems = self.known.get(_key(kernel), set())
            problem = next(iter(problems)) if len(problems) == 1 else None
            if problem is None or problem[2] is None:
                yield alone(context, kernel)
                continue
            if problem not in open_calls or _key(kernel) in self.first:
                if problem in open_calls:
                    yield open_calls[problem]
                open_calls[problem] = Call(*problem, context.layer, context.phase, inferred=True)
            open_calls[problem].kernels.append(kernel)
        yield from open_calls.values()


def _key(kernel: Kernel) -> Key:
    return kernel.name, kernel.grid


def _is_fill(kernel: Kernel) -> bool:
    """Copies and fills: a graph has more of them than the same step run eagerly."""
    return kind_of(kernel.name).kind == COPY


def _problem(call: Call) -> Problem:
    """What a call did, without the routing of that one call."""
    what = call.what
    if isinstance(what, Scope):
        facts = {name: value for name, value in what.facts.items() if name == "inter"}
        what = Scope(stem=what.stem, problem=what.problem, facts=facts)
    return call.kind, call.op, what
