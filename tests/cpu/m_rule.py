"""What the tests of the M rule share: layers that meet several kernels, and the kernels that a call really ran."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from w4a16.device import current_device
from w4a16.dispatch import choose
from w4a16.nn import W4A16Linear
from w4a16.problem import ACT_NAMES, Problem
from w4a16.roofline import scopes

TRACED = 2048
ROWS = (1, 5, 6, 17, TRACED)
ORDERS = list(itertools.permutations(ROWS))


def wanted(net: nn.Module, m: int) -> list[str]:
    """The kernels that `choose` names for one call of `net` at M = m."""
    return [_wanted(layer, m) for layer in net.modules() if isinstance(layer, W4A16Linear)]


def _wanted(layer: W4A16Linear, m: int) -> str:
    w = layer.get()
    problem = Problem(
        m=m,
        n=w.n,
        k=w.k,
        group=w.group,
        act=ACT_NAMES[w.act],
        has_zeros=w.has_zeros,
        resident=layer.dense is not None,
    )
    return choose(problem, current_device(w.codes.device), w.layout).row.stem


@contextmanager
def ran() -> Iterator[list[tuple[str, int]]]:
    """(stem, M) of every call inside, in order, from the labels in a profiler's trace."""
    found: list[tuple[str, int]] = []
    with profile(activities=[ProfilerActivity.CPU]) as trace, scopes.profiling():
        yield found
    for event in sorted(trace.events(), key=lambda event: event.time_range.start):
        label = scopes.parse(event.name)
        if label is not None:
            found.append((label.stem, label.problem.m))


def rows(m: int, k: int, device: str = "cpu") -> torch.Tensor:
    """Activations whose row count the compiler must leave open: unbacked, so that 1 is no special case either."""
    x = torch.randn(m, k, device=device).bfloat16()
    torch._dynamo.decorators.mark_unbacked(x, 0)
    return x
