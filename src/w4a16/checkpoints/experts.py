"""Joins the per-expert tensors of a mixture-of-experts layer into two stacked weights, expert by expert."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import Unsupported
from ..weight import CODES_PER_WORD, SYMMETRIC_ZERO, QuantizedWeight
from .base import Plan
from .bits import empty
from .shards import bad

Expert = tuple[int, str]  # its number and the projection
EXPERT = re.compile(r"(.+\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj|w1|w2|w3)$")
# gate, up, down; the second spelling is Mixtral's
SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class Source(Protocol):
    """Where modules are read from: a Checkpoint, or a Stream over it."""

    path: Path

    def plan(self, module: str) -> Plan: ...
    def weight(self, module: str) -> QuantizedWeight: ...


def expert_modules(path: Path, prefix: str, found: Sequence[Expert]) -> tuple[list[list[str]], list[list[str]]]:
    """Names by expert: of gate and up, and of down."""
    gate, up, down = next(names for names in SPELLINGS if found[0][1] in names)
    numbers = range(1 + max(number for number, _ in found))
    upper = [[f"{prefix}.{number}.{gate}", f"{prefix}.{number}.{up}"] for number in numbers]
    lower = [[f"{prefix}.{number}.{down}"] for number in numbers]
    known = set(found)
    for number, projection in ((number, projection) for number in numbers for projection in (gate, up, down)):
        if (number, projection) not in known:
            module = f"{prefix}.{number}.{projection}"
            raise bad(f"{path}: {module}", got="no 4-bit weight", wanted="one, as other experts have")
    return upper, lower


def stack(checkpoint: Source, experts: Sequence[Sequence[str]]) -> QuantizedWeight:
    """One weight [E, N, K]; the modules of one expert lie one above the other."""
    first = checkpoint.plan(experts[0][0])
    rows = first.n * len(experts[0])
    lead = (len(experts), rows)
    codes: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    perm: Tensor | None = None
    for index, modules in enumerate(experts):
        orders = []
        for row, module in enumerate(modules):
            _check_alike(checkpoint, module, experts[0][0])
            weight = checkpoint.weight(module)
            orders.append(weight.perm)
            device = weight.codes.device
            if codes is None or scales is None:
                codes = empty(*lead, first.k // CODES_PER_WORD, device=device)
                scales = torch.empty((*lead, first.groups), dtype=weight.scales.dtype, device=device)
            if scales.dtype != weight.scales.dtype:
                raise bad(f"{checkpoint.path}: {module} scales", got=weight.scales.dtype, wanted=scales.dtype)
            if weight.zeros is not None and zeros is None:
                # experts read before this one store none: theirs are the symmetric ones
                zeros = torch.full((*lead, first.groups), SYMMETRIC_ZERO, dtype=torch.uint8, device=device)
            span = slice(row * first.n, (row + 1) * first.n)
            codes[index, span] = weight.codes
            scales[index, span] = weight.scales
            if zeros is not None and weight.zeros is not None:
                zeros[index, span] = weight.zeros
        order = _shared_order(checkpoint, modules, orders)
        if order is not None:
            if perm is None:
                perm = torch.arange(first.k, device=order.device).repeat(len(experts), 1)
            perm[index] = order
    assert codes is not None
    assert scales is not None
    return QuantizedWeight(codes=codes, scales=scales, zeros=zeros, group=first.group, perm=perm)


def _check_alike(checkpoint: Source, module: str, first: str) -> None:
    have, want = checkpoint.plan(module), checkpoint.plan(first)
    if (have.n, have.k, have.group) != (want.n, want.k, want.group):
        raise bad(
            f"{checkpoint.path}: {module}",
            got=f"N={have.n} K={have.k} group={have.group}",
            wanted=f"N={want.n} K={want.k} group={want.group} as {first}",
        )


def _shared_order(checkpoint: Source, modules: Sequence[str], orders: Sequence[Tensor | None]) -> Tensor | None:
    if all(order is None for order in orders):
        return None
    first, *others = orders
    if first is None or not all(other is not None and torch.equal(first, other) for other in others):
        raise Unsupported(
            f"{checkpoint.path}: got different act-order permutations in {' and '.join(modules)}, wanted one for both: "
            "w4a16 reads their input once. Quantise without desc_act."
        )
    return first
