"""A call like one before is launched again from addresses alone: every argument is the one that its plan would give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_weight
from torch.multiprocessing.reductions import StorageWeakRef

from w4a16 import ops
from w4a16.device import known_device
from w4a16.dispatch import Served, choose
from w4a16.kernels import sm90_decode, sm90_moe, sm90_prefill
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
    bind = repeat(launches, given=(out, x), fixed=fixed)
    assert bind is not None
    weight = pack(random_weight(512, 1024, group=128, asym=asym), layout="SM90")  # another layer, alike
    fixed = (weight.codes, weight.scales, weight.zeros, None)
    out, x, launches = planned(m, weight)
    bind(fixed)(out, x)
    addresses = {tensor.data_ptr() for tensor in (out, x, *fixed) if tensor is not None}
    for launch, (fn, grid, *args) in zip(launches, ran, strict=True):
        assert (fn, grid) == (launch.fn, launch.grid)
        for (name, wanted), got in zip((launch.args | launch.constants).items(), args, strict=True):
            workspace = isinstance(wanted, torch.Tensor) and wanted.data_ptr() not in addresses
            assert workspace or facts(got) == facts(wanted), name


@pytest.mark.parametrize("split", [1, 2])
def test_two_launches_name_parts_of_the_tensors(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Launch, "compiled", lambda launch: lambda grid, *args: ran.append((launch.fn, grid, *args)))
    tile = choose(Problem(m=160, n=512, k=1024, group=128, act="bf16"), SM90, "SM90").tile
    tile = replace(tile, split_k=1, paired=False, first_n=192, rest=replace(tile, split_k=split, paired=False))
    rows = torch.randn(162, 1024 + 512).bfloat16()  # x and the output may lie side by side

    def asked() -> tuple[dict[str, Any], tuple[torch.Tensor | None, ...]]:
        weight = pack(random_weight(512, 1024, group=128, asym=True), layout="SM90")
        bias = torch.randn(512).bfloat16()
        out, x = rows[1:-1, 1024:], rows[1:-1, :1024]
        given = {"out": out, "x": x, "weight": weight, "bias": bias, "tile": tile}
        return given, (weight.codes, weight.scales, weight.zeros, bias)

    given, fixed = asked()
    bind = repeat(sm90_prefill.plan(**given), given=(given["out"], given["x"]), fixed=fixed)
    assert bind is not None
    given, fixed = asked()  # another layer, alike
    bind(fixed)(given["out"], given["x"])
    wanted_launches = sm90_prefill.plan(**given)
    assert len(wanted_launches) == len(ran) == 1 + split
    for launch, (fn, grid, *args) in zip(wanted_launches, ran, strict=True):
        assert (fn, grid) == (launch.fn, launch.grid)
        for (name, wanted), got in zip((launch.args | launch.constants).items(), args, strict=True):
            assert name == "parts_ptr" or facts(got) == facts(wanted), name


def test_no_weight_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "compiled", lambda launch: lambda *_: None)
    weight = pack(random_weight(512, 1024, group=128, asym=True), layout="SM90")
    assert weight.zeros is not None
    held = [StorageWeakRef(tensor.untyped_storage()) for tensor in (weight.codes, weight.scales, weight.zeros)]
    out, x, launches = planned(17, weight)
    fixed = (weight.codes, weight.scales, weight.zeros, None)
    bind = repeat(launches, given=(out, x), fixed=fixed)
    assert bind is not None
    again = bind(fixed)
    del weight, launches, fixed
    assert again is not None
    assert all(storage.expired() for storage in held)


def test_layers_alike_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes by address of every launch: each layer's own, from a plan of the first; zero points make another kind."""
    ran: list[int] = []
    plans: list[int] = []

    def compiled(launch: Launch) -> Any:
        codes = list(launch.args).index("codes_desc")
        return lambda grid, *args: ran.append(args[codes].base.data_ptr())

    monkeypatch.setattr(Launch, "compiled", compiled)
    for name in ("_repeats", "_plans"):
        monkeypatch.setattr(ops, name, {})
    m, weights = 160, [pack(random_weight(512, 1024, group=128, asym=asym), layout="SM90") for asym in (0, 0, 1)]
    for call, weight in enumerate([*weights, weights[0]]):
        problem = Problem(m=m, n=512, k=1024, group=128, act="bf16", has_zeros=weight.has_zeros)
        tile = replace(choose(problem, SM90, "SM90").tile, split_k=1)

        def plan(**asked: Any) -> tuple[Launch, ...]:
            plans.append(m)
            return sm90_prefill.plan(**asked)

        served = Served(problem=problem, stem="sm90_prefill", launch=sm90_prefill.sm90_prefill, tile=tile, plan=plan)
        x, out = torch.randn(m, 1024).bfloat16(), torch.empty(m, 512).bfloat16()
        ops._first((call,), served, out=out, x=x, weight=weight, bias=None, tile=tile)
    assert ran == [weight.codes.data_ptr() for weight in (*weights, weights[0])]
    assert len(plans) == 2


def experts_asked(tokens: int) -> dict[str, Any]:
    x = torch.randn(tokens, 256).bfloat16()
    w13, w2 = random_weight(256, 256, group=64, experts=8), random_weight(256, 128, group=64, experts=8)
    problem = Problem(m=tokens, n=256, k=256, group=64, act="bf16", experts=8, top_k=2)
    return {
        "out": torch.empty_like(x),
        "x": x,
        "w13": pack(w13, layout="SM90"),
        "w2": pack(w2, layout="SM90"),
        "topk_weights": torch.rand(tokens, 2),
        "topk_ids": torch.rand(tokens, 8).topk(2).indices,
        "activation": "silu",
        "gated": True,
        "weight_input": False,
        "tile": choose(problem, SM90, "SM90").tile,
    }


@pytest.mark.parametrize("tokens", [1, 4, 40, 700])
def test_expert_layers_alike_share_one_plan(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments are those of a plan for the layer itself, but for workspaces, each of which is one everywhere."""
    ran: list[tuple[Any, ...]] = []
    plans: list[int] = []
    monkeypatch.setattr(Launch, "compiled", lambda launch: lambda grid, *args: ran.append((launch.fn, grid, *args)))
    monkeypatch.setattr(ops, "_plans", {})

    def plan(**asked: Any) -> tuple[Launch, ...]:
        plans.append(tokens)
        return sm90_moe.plan(**asked)

    for _ in range(2):
        ran.clear()
        asked = experts_asked(tokens)
        ops._experts("sm90_moe", plan, **asked)
    assert len(plans) == 1
    tensors = (*(asked[name] for name in ("out", "x", "topk_weights", "topk_ids")), *weights_of(asked))
    known = {tensor.data_ptr() for tensor in tensors}
    spaces: dict[int, int] = {}
    for launch, (fn, grid, *args) in zip(sm90_moe.plan(**asked), ran, strict=True):
        assert (fn, grid) == (launch.fn, launch.grid)
        for (name, wanted), got in zip((launch.args | launch.constants).items(), args, strict=True):
            tensor = wanted.base if hasattr(wanted, "block_shape") else wanted
            if not isinstance(tensor, torch.Tensor) or tensor.data_ptr() in known:
                assert facts(got) == facts(wanted), name
                continue
            address = got.base.data_ptr() if hasattr(got, "block_shape") else got
            assert spaces.setdefault(tensor.data_ptr(), address) == address, name
            assert not hasattr(got, "block_shape") or facts(got)[1:] == facts(wanted)[1:], name
    assert len(set(spaces.values())) == len(spaces)


def weights_of(asked: dict[str, Any]) -> list[torch.Tensor]:
    return [getattr(asked[weight], name) for weight in ("w13", "w2") for name in ("codes", "scales")]
