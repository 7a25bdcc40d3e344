"""A call like one before is launched again from addresses alone: every argument is the one that its plan would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_weight
from torch.multiprocessing.reductions import StorageWeakRef

from w4a16.device import known_device
from w4a16.dispatch import choose
from w4a16.kernels import sm90_decode, sm90_prefill
from w4a16.kernels._launch import Launch, repeat
from w4a16.layouts import PackedWeight, pack
from w4a16.problem import Problem

SM90 = known_device("sm90")


def planned(m: int, weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, tuple[Launch, ...]]:
    problem = Problem(m=m, n=weight.n, k=weight.k, group=weight.group, act="bf16", has_zeros=weight.has_zeros)
    choice = choose(problem, SM90, weight.layout)
    plan = {"sm90_decode": sm90_decode, "sm90_prefill": sm90_prefill}[choice.row.stem].plan
    x, out = torch.randn(m, weight.k).bfloat16(), torch.empty(m, weight.n).bfloat16()
    return out, x, plan(out=out, x=x, weight=weight, bias=None, tile=choice.tile)


def facts(value: Any) -> Any:
    """A run-time argument as a kernel sees it: an address, or the boxes of one."""
    if hasattr(value, "block_shape"):
        return value.base.data_ptr(), value.shape, value.strides, value.block_shape, value.layout
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("m", [1, 16, 17, 160, 4096])
def test_the_arguments_are_those_of_a_plan(m: int, asym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Launch, "compiled", lambda launch: lambda grid, *args: ran.append((launch.fn, grid, *args)))
    weight = pack(random_weight(512, 1024, group=128, asym=asym), layout="SM90")
    out, x, launches = planned(m, weight)
    fixed = (weight.codes, weight.scales, weight.zeros, None)
    again = repeat(launches, out=out, x=x, fixed=fixed)
    assert again is not None
    out, x, launches = planned(m, weight)
    again(out, x)
    addresses = {tensor.data_ptr() for tensor in (out, x, *fixed) if tensor is not None}
    for launch, (fn, grid, *args) in zip(launches, ran, strict=True):
        assert (fn, grid) == (launch.fn, launch.grid)
        for (name, wanted), got in zip((launch.args | launch.constants).items(), args, strict=True):
            workspace = isinstance(wanted, torch.Tensor) and wanted.data_ptr() not in addresses
            assert workspace or facts(got) == facts(wanted), name


def test_no_weight_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "compiled", lambda launch: lambda *_: None)
    weight = pack(random_weight(512, 1024, group=128, asym=True), layout="SM90")
    assert weight.zeros is not None
    held = [StorageWeakRef(tensor.untyped_storage()) for tensor in (weight.codes, weight.scales, weight.zeros)]
    out, x, launches = planned(17, weight)
    again = repeat(launches, out=out, x=x, fixed=(weight.codes, weight.scales, weight.zeros, None))
    assert again is not None
    del weight, launches
    assert all(storage.expired() for storage in held)
