"""The expert layers that are measured, and the archetypes of their routing."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput, explain_mismatch
from ..problem import ACT_DTYPES, Problem
from ..weight import QuantizedWeight
from .run import random_words

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
ROUTINGS = ("balanced", "uniform", "zipf1", "zipf2", "hot16")
HOT = 16  # experts that get all but a hundredth of the weight of `hot16`


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """One expert layer: hidden -> 2 x inter, gated -> hidden, of `experts`, `top_k` a token."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inter: int
    group: int = 128

    def problem(self, tokens: int, act: str, has_zeros: bool) -> Problem:
        return Problem(
            m=tokens,
            n=2 * self.inter,
            k=self.hidden,
            group=self.group,
            act=act,
            has_zeros=has_zeros,
            experts=self.experts,
            top_k=self.top_k,
        )


EXPERTS = {
    shape.name: shape
    for shape in (
        ExpertShape(name="qwen3-30b-a3b", experts=128, top_k=8, hidden=2048, inter=768),
        ExpertShape(name="qwen3.5-35b-a3b", experts=256, top_k=8, hidden=2048, inter=512),
        ExpertShape(name="qwen3-omni-30b-a3b", experts=128, top_k=8, hidden=2048, inter=768, group=32),
        ExpertShape(name="mixtral-8x7b", experts=8, top_k=2, hidden=4096, inter=14336),
    )
}


def expert_shapes_of(names: str) -> tuple[ExpertShape, ...]:
    """Expert layers from a comma-separated list of models and EXPERTSxTOP_KxHIDDENxINTER.

    Raises BadInput that lists the models when a name is neither.
    """
    found = []
    for name in names.split(","):
        if name in EXPERTS:
            found.append(EXPERTS[name])
        elif match := re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", name):
            experts, top_k, hidden, inter = map(int, match.groups())
            found.append(ExpertShape(name=name, experts=experts, top_k=top_k, hidden=hidden, inter=inter))
        else:
            wanted = f"EXPERTSxTOP_KxHIDDENxINTER, {', '.join(EXPERTS)}"
            raise BadInput(explain_mismatch("shapes", got=name, wanted=wanted, then="Name some of these."))
    return tuple(found)


def routed(routing: str, tokens: int, shape: ExpertShape, generator: torch.Generator) -> Tensor:
    """Experts of each token, distinct; by Gumbel top-k of an archetype's weights."""
    if routing == "balanced":
        return (torch.arange(tokens * shape.top_k) % shape.experts).view(tokens, shape.top_k)
    rank = torch.arange(1, shape.experts + 1).float()
    hot = torch.where(rank <= HOT, 1.0, 0.01)
    weight = {"uniform": rank**0, "zipf1": 1 / rank, "zipf2": rank**-2, "hot16": hot}[routing]
    gumbel = -torch.empty(tokens, shape.experts).exponential_(generator=generator).log()
    return (weight.log() + gumbel).topk(shape.top_k).indices


def random_experts(
    shape: ExpertShape, *, act: str, has_zeros: bool, device: torch.device
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Random w13 and w2 on `device`."""
    w13 = _random(shape, 2 * shape.inter, shape.hidden, act, has_zeros, device)
    return w13, _random(shape, shape.hidden, shape.inter, act, has_zeros, device)


def _random(shape: ExpertShape, n: int, k: int, act: str, has_zeros: bool, device: torch.device) -> QuantizedWeight:
    grid = (shape.experts, n, k // shape.group)
    return QuantizedWeight(
        codes=random_words((shape.experts, n, k // 8), device),
        scales=(torch.rand(grid, device=device) * 0.02 + 0.005).to(ACT_DTYPES[act]),
        zeros=torch.randint(0, 16, grid, dtype=torch.uint8, device=device) if has_zeros else None,
        group=shape.group,
    )


def some_experts(weight: QuantizedWeight, experts: Tensor) -> QuantizedWeight:
    """Some experts of a weight."""
    zeros = None if weight.zeros is None else weight.zeros[experts]
    return QuantizedWeight(codes=weight.codes[experts], scales=weight.scales[experts], zeros=zeros, group=weight.group)
