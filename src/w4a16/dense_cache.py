"""Dequantised copies of weights for prefill, kept under a memory budget.

`budget = total x utilization`: a copy is kept only while `free - total x (1 - utilization) >= bytes of the copy`. Free
memory is read anew for each weight, in load order, so that what is already kept counts. A copy is made only where a
tuning row of dense_resident says that it is faster than the fused kernels; decode never reads it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import env
from .device import Device, current_device, free_and_total
from .dispatch import choose
from .dispatch_table import DECODE_ROWS
from .errors import BadInput, OverBudget, Unsupported, explain_mismatch
from .layouts import PackedWeight
from .nn import W4A16Linear
from .problem import ACT_DTYPES, ACT_NAMES, Problem
from .residency import Report, megabytes, report
from .roofline.model import weight_bytes
from .tuning.table import device_rows
from .tuning.tiles import ResidentTile

POLICIES = ("off", "soft", "hard")
CLIFF_BYTES = 2048  # rows this far apart, or a multiple of it, fall on one memory channel of gfx11
NO_COPY = "none: no tuning row of {} makes it faster than the 4-bit kernels"
BLOCK_ROWS = 4096  # dequantised at a time where there is no kernel for it


def cache_dense(model: nn.Module, *, policy: str = "soft", utilization: float = 0.9) -> Report:
    """Makes the copies that pay for the linear weights of `model`, on the devices they lie on, within the budget.

    policy  off: drops the copies there are; soft: weights that do not fit stay 4-bit alone, with one warning; hard:
            raises OverBudget at the first that does not fit, with no copy left from this call
    Copies go when their module goes, moves, is cast or loads other weights; pickles and deep copies hold none.
    """
    if policy not in POLICIES:
        raise BadInput(explain_mismatch("policy", got=repr(policy), wanted=" or ".join(POLICIES), then="Name one."))
    if not 0 < utilization <= 1:
        raise BadInput(explain_mismatch("utilization", got=utilization, wanted="over 0, to 1", then="Pass 0.9."))
    made: list[W4A16Linear] = []
    refused: list[str] = []
    for name, layer in _linears(model):
        if policy == "off":
            layer.drop_dense("policy off")
        elif layer.dense is None and (plan := _plan(layer)) is not None:
            over = _keep(layer, plan, utilization)
            if over is None:
                made.append(layer)
            elif policy == "hard":
                for each in made:
                    each.drop_dense(f"policy hard, and {name} did not fit")
                then = f"Raise utilization over {utilization}, pass policy='soft', or leave the copies off."
                raise OverBudget(f"dense copy of {name}: {over}. {then}")
            else:
                refused.append(name)
    if refused:
        warnings.warn(
            f"{len(refused)} of {len(refused) + len(made)} dense copies do not fit into {utilization} of the memory "
            f"(first {refused[0]}); these weights keep the 4-bit prefill kernels. See w4a16.report(model).",
            stacklevel=2,
        )
    return report(model)


_asked: ContextVar[tuple[str | None, float | None]] = ContextVar("w4a16_dense_cache", default=(None, None))


@contextmanager
def asked(policy: str | None, utilization: float | None) -> Iterator[None]:
    """What the loads inside ask of `cache_loaded`; None: what the environment says."""
    token = _asked.set((policy, utilization))
    try:
        yield
    finally:
        _asked.reset(token)


def cache_loaded(model: nn.Module) -> None:
    """`cache_dense` at the end of a load, as `asked` or W4A16_DENSE_CACHE and W4A16_MEMORY_UTILIZATION say."""
    policy, utilization = _asked.get()
    if utilization is None:
        try:
            utilization = float(env.MEMORY_UTILIZATION)
        except ValueError:
            got, then = repr(env.MEMORY_UTILIZATION), "Set it to 0.9."
            raise BadInput(
                explain_mismatch("W4A16_MEMORY_UTILIZATION", got=got, wanted="a number", then=then)
            ) from None
    cache_dense(model, policy=policy or env.DENSE_CACHE, utilization=utilization)


@dataclass(frozen=True, kw_only=True)
class CopyPlan:
    """The copy of one weight that pays: from how many rows, in which form, of how many bytes."""

    first_m: int
    tile: ResidentTile
    bytes: int


@functools.lru_cache(maxsize=1 << 12)
def copy_plan(problem: Problem, device: Device, layout: str | None = None) -> CopyPlan | None:
    """The copy that dispatch would read from some row count on; None where no tuning row has one."""
    starts = {row.conditions.get("m_min", 1) for row in device_rows("dense_resident", device) if row.use}
    for m in sorted(max(start, DECODE_ROWS + 1) for start in starts):
        try:
            choice = choose(replace(problem, m=m, resident=True), device, layout)
        except Unsupported:  # a forced kernel that cannot run
            continue
        if choice.row.stem == "dense_resident":
            dtype = _dtype(choice.tile, ACT_DTYPES[problem.act])
            size = problem.n * _stride(choice.tile, problem.k, dtype) * dtype.itemsize
            return CopyPlan(first_m=m, tile=choice.tile, bytes=size)
    return None


def describe_copy(problem: Problem, device: Device) -> str:
    """What `cache_dense` would do for this weight, its budget aside."""
    plan = copy_plan(problem, device)
    if plan is None:
        return NO_COPY.format(device.arch)
    sizes = f"{megabytes(plan.bytes)} beside {megabytes(weight_bytes(problem))} packed"
    return f"would serve {plan.first_m} rows and more, with {sizes}"


def make_copy(weight: PackedWeight, tile: ResidentTile) -> Tensor:
    """[N, K] of `weight` dequantised, columns in the order of the codes."""
    from .kernels.dense import dequantize_all

    dtype = _dtype(tile, weight.act)
    stored = weight.codes.new_empty((weight.n, _stride(tile, weight.k, dtype)), dtype=dtype)
    copy = stored[:, : weight.k]
    dequantize_all(copy, weight, BLOCK_ROWS)
    return copy


def _plan(layer: W4A16Linear) -> CopyPlan | None:
    weight = layer.get()
    device, act = current_device(weight.codes.device), ACT_NAMES[weight.act]
    problem = Problem(m=1, n=weight.n, k=weight.k, group=weight.group, act=act, has_zeros=weight.has_zeros)
    plan = copy_plan(problem, device, weight.layout)
    if plan is None:
        layer.dense_why = NO_COPY.format(device.arch)
    return plan


def _keep(layer: W4A16Linear, plan: CopyPlan, utilization: float) -> str | None:
    """Gives `layer` its copy, or says what the budget lacks; the layer keeps the sentence for the report."""
    weight = layer.get()
    free, total = free_and_total(weight.codes.device)
    spare = free - round(total * (1 - utilization))
    budget = f"{utilization} x {megabytes(total)} ({megabytes(free)} free)"
    over = f"{megabytes(plan.bytes)} wanted, {megabytes(max(spare, 0))} left of {budget}"
    if spare >= plan.bytes:
        try:
            layer.dense, layer.dense_why = make_copy(weight, plan.tile), f"serves {plan.first_m} rows and more"
            return None
        except torch.OutOfMemoryError:
            over += ", but not in one piece"
    layer.dense_why = f"over budget: {over}"
    return over


def _dtype(tile: ResidentTile, act: torch.dtype) -> torch.dtype:
    return torch.float32 if tile.dtype == "fp32" else act


def _stride(tile: ResidentTile, k: int, dtype: torch.dtype) -> int:
    """Elements between rows of the copy."""
    padded = k * dtype.itemsize % CLIFF_BYTES == 0
    return k + tile.pad_bytes // dtype.itemsize if padded else k


def _linears(model: nn.Module) -> Iterator[tuple[str, W4A16Linear]]:
    """Those that some kernel can serve where they lie."""
    for name, module in model.named_modules():
        if not isinstance(module, W4A16Linear) or module.codes is None:
            continue
        if module.codes.device.type in ("cpu", "cuda") and module.scales.dtype in ACT_NAMES:
            yield name, module
