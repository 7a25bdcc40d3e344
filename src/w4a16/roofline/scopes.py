"""Named ranges around every call, for profilers: opened inside the operator's body, only while profiling is asked for.

A range opened inside a region that torch.compile traces vanishes; the body of an opaque operator is never traced, so
these survive. A replayed CUDA graph runs no Python: its kernels carry no range, `trace` finds their shapes by others'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from .. import env
from ..device import is_capturing, nvtx_range
from ..moe.route import choose_block
from ..problem import Problem
from ..tuning.gfx11_tiles import Gfx11Tile
from ..tuning.sm90_moe_tiles import Sm90MoeTile
from ..tuning.tiles import MoeTile
from .labels import LAYER, label, parse

__all__ = ["enabled", "label", "layers", "moe_facts", "parse", "profiling", "scope", "scoped"]

enabled = env.PROFILE


@contextmanager
def profiling() -> Iterator[None]:
    """Opens a range around every call of w4a16, on every thread, until it ends."""
    global enabled
    before, enabled = enabled, True
    try:
        yield
    finally:
        enabled = before


@contextmanager
def scope(stem: str, problem: Problem, **facts: int | Sequence[int]) -> Iterator[None]:
    """A range named by the call, while profiling is asked for."""
    if not enabled:
        yield
        return
    name = label(stem, problem, **facts)
    with record_function(name), nvtx_range(name):
        yield


def scoped(
    launch: Callable[..., None], stem: str, problem: Problem, facts: Mapping[str, int | Sequence[int]] | None = None
) -> Callable[..., None]:
    """`launch` inside its range."""

    def run(**arguments: Any) -> None:
        with scope(stem, problem, **(facts or {})):
            launch(**arguments)

    return run


def moe_facts(topk_ids: Tensor, problem: Problem, intermediate: int, tile: object) -> dict[str, int | Sequence[int]]:
    """What the routing of one expert call comes to. Waits for the GPU; while a graph is captured nothing is counted."""
    facts: dict[str, int | Sequence[int]] = {"inter": intermediate}
    if is_capturing():
        return facts
    ids = topk_ids.flatten().long()
    load = torch.bincount(ids[(ids >= 0) & (ids < problem.experts)], minlength=problem.experts).cpu()
    facts |= {"n_routed": int(load.sum()), "experts": int((load > 0).sum())}
    if isinstance(tile, Sm90MoeTile):
        facts |= _blocks(load, tile.block_m)
    elif isinstance(tile, (MoeTile, Gfx11Tile)):
        block = choose_block(problem.m, problem.top_k, problem.experts, tile.block_m)
        facts |= _blocks(load, block)
    return facts


def _blocks(load: Tensor, block: int) -> dict[str, int | Sequence[int]]:
    """How blocks of `block` rows cover the experts' loads."""
    blocks = (load + block - 1) // block
    partial = load[load % block > 0] % block
    rows = torch.bincount(partial, minlength=block + 1)
    rows[block] += int((load // block).sum())
    return {
        "block_m": block,
        "valid_blocks": int(blocks.sum()),
        "tok_hist": torch.bincount(blocks).tolist(),
        "vtok_hist": rows.tolist(),
    }


@contextmanager
def layers(model: nn.Module) -> Iterator[None]:
    """Opens a range `layer <name>` around every module's forward, for `roofline --by layer`. Eager mode only."""
    open_ranges: list[record_function] = []

    def enter(name: str) -> Callable[..., None]:
        def before(*_: object) -> None:
            open_ranges.append(record_function(LAYER + name))
            open_ranges[-1].__enter__()

        return before

    def leave(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
