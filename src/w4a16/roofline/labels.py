"""The name of a profiler range: a kernel's stem, its problem, and what was counted. Written by scopes, read by trace.

    sm90_decode 1x24576x4096 g=128 asym
    triton_moe 16x1536x2048 E=128 top_k=8 g=128 sym inter=768 block_m=16 n_routed=128 experts=77 valid_blocks=80 ...

MxNxK, then E= and top_k= of an expert call, then g=, `sym` or `asym`, then the activation dtype unless it is bf16.
Facts of expert calls, all optional: inter (columns of the second weight; without it the call is one GEMM), block_m,
n_routed (slots computed), experts (distinct ones among them), valid_blocks, tok_hist (experts that fill 0, 1, 2, ...
blocks) and vtok_hist (blocks with 0, 1, ... block_m valid rows).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import BadInput
from ..problem import ACT_DTYPES, Problem
from .model import Cost, Routing, cost, uncounted

LAYER = "layer "  # how the range of a module starts; its dotted name follows

Fact = int | tuple[int, ...]

_HEAD = re.compile(r"(\w+) (\d+)x(\d+)x(\d+)((?: [\w=,]+)*)")
_FACT = re.compile(r"(\w+)=(\d+(?:,\d+)*)")


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One label, read back."""

    stem: str
    problem: Problem
    facts: Mapping[str, Fact] = field(default_factory=dict, hash=False)

    @property
    def act(self) -> str:
        return self.problem.act

    @property
    def shape(self) -> str:
        """The problem alone, in the label's words."""
        return label(self.stem, self.problem).split(" ", 1)[1]

    def routing(self) -> Routing | None:
        """What the experts did, as far as it was counted; None for a linear call."""
        if not self.problem.experts:
            return None
        least = uncounted(self.problem)
        slots = self._number("n_routed", least.slots)
        filled = self.facts.get("tok_hist", ())
        touched = sum(filled[1:]) if isinstance(filled, tuple) and filled else min(slots, self.problem.experts)
        return Routing(
            slots=slots,
            touched=self._number("experts", touched),
            rows=self._number("valid_blocks", 0) * self._number("block_m", 0) or slots,
            intermediate=self._number("inter", 0),
        )

    def cost(self) -> Cost:
        return cost(self.problem, self.routing())

    def _number(self, name: str, otherwise: int) -> int:
        value = self.facts.get(name, otherwise)
        return value if isinstance(value, int) else otherwise


def label(stem: str, problem: Problem, **facts: int | Sequence[int]) -> str:
    """The range name of one call; a histogram is a sequence of counts."""
    p = problem
    words = [stem, f"{p.m}x{p.n}x{p.k}"]
    if p.experts:
        words += [f"E={p.experts}", f"top_k={p.top_k}"]
    words += [f"g={p.group}", "asym" if p.has_zeros else "sym"]
    if p.act != "bf16":
        words.append(p.act)
    for name, value in facts.items():
        words.append(f"{name}={value}" if isinstance(value, int) else f"{name}={','.join(map(str, value))}")
    return " ".join(words)


@functools.lru_cache(maxsize=1 << 16)
def parse(name: str) -> Scope | None:
    """The label of one call, or None for any other range: without `g=` the bytes would be a guess."""
    head = _HEAD.fullmatch(name)
    if head is None:
        return None
    stem, *sizes, rest = head.groups()
    m, n, k = map(int, sizes)
    facts: dict[str, Fact] = {}
    act, has_zeros = "bf16", False
    for word in rest.split():
        if word in ACT_DTYPES:
            act = word
        elif word in ("sym", "asym"):
            has_zeros = word == "asym"
        elif fact := _FACT.fullmatch(word):
            counts = tuple(map(int, fact[2].split(",")))
            facts[fact[1]] = counts if fact[1].endswith("_hist") else counts[0]
        else:
            return None
    sizes_of = {key: facts.pop(key, 0) for key in ("g", "E", "top_k")}
    group, experts, top_k = (value if isinstance(value, int) else 0 for value in sizes_of.values())
    try:
        problem = Problem(m=m, n=n, k=k, group=group, act=act, has_zeros=has_zeros, experts=experts, top_k=top_k)
    except BadInput:
        return None
    return Scope(stem=stem, problem=problem, facts=facts)
