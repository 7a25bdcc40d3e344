"""Scopes: ranges around real calls, only when asked for, and what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_weight
from torch import nn
from torch.profiler import ProfilerActivity, profile

import w4a16
from w4a16.dispatch import record
from w4a16.nn import W4A16Experts, W4A16Linear
from w4a16.problem import Problem
from w4a16.roofline import scopes
from w4a16.roofline.labels import parse
from w4a16.roofline.step import step_of
from w4a16.roofline.trace import read
from w4a16.tuning.tiles import MoeTile

TILE = MoeTile(block_m=64, block_n=64, block_k=32)


def names(work, *, on: bool = True) -> list[str]:
    """The labels of the ranges that `work` opens."""
    with profile(activities=[ProfilerActivity.CPU]) as p:
        if on:
            with scopes.profiling():
                work()
        else:
            work()
    return [e.name for e in p.events() if parse(e.name) is not None or e.name.startswith("layer ")]


def test_a_linear_call_opens_its_range():
    weight = w4a16.pack(random_weight(96, 128, group=32, asym=True))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with record() as served:
        w4a16.linear(x, weight)
    ((stem, problem),) = served
    assert problem == Problem(m=3, n=96, k=128, group=32, has_zeros=True)
    assert names(lambda: w4a16.linear(x, weight)) == [f"{stem} 3x96x128 g=32 asym"]


def test_nothing_is_opened_unasked():
    weight = w4a16.pack(random_weight(96, 128, group=32))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert not scopes.enabled
    assert names(lambda: w4a16.linear(x, weight), on=False) == []
    with pytest.raises(RuntimeError), scopes.profiling():
        raise RuntimeError
    assert not scopes.enabled


def test_the_environment_turns_ranges_on():
    code = "from w4a16.roofline import scopes; print(scopes.enabled)"
    for value, wanted in (("1", "True"), ("0", "False")):
        environment = {**os.environ, "W4A16_PROFILE": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted


def test_the_result_is_the_same_inside():
    weight = w4a16.pack(random_weight(96, 128, group=32))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with scopes.profiling():
        inside = w4a16.linear(x, weight)
    assert torch.equal(inside, w4a16.linear(x, weight))


def test_ranges_survive_compile():
    """The row count of each call, in a graph traced once."""
    layer = W4A16Linear.of(w4a16.pack(random_weight(96, 128, group=32)))
    compiled = torch.compile(layer, dynamic=True, backend="eager")
    with torch.no_grad():
        found = names(lambda: [compiled(torch.randn(m, 128, dtype=torch.bfloat16)) for m in (4, 2, 33)])
    assert [scope.problem.m for name in found if (scope := parse(name))] == [4, 2, 33]


def experts() -> tuple[W4A16Experts, torch.Tensor, torch.Tensor]:
    layer = W4A16Experts(4)
    layer.set(
        w4a16.pack(random_weight(128, 64, group=32, experts=4)), w4a16.pack(random_weight(64, 64, group=32, experts=4))
    )
    ids = torch.tensor([[0, 2], [2, 0], [0, 3]])
    return layer, ids, torch.full(ids.shape, 0.5)


def test_an_expert_call_counts_the_experts_it_touches():
    layer, ids, weights = experts()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    (name,) = names(lambda: layer(x, ids, weights))
    scope = parse(name)
    assert scope is not None
    assert scope.problem == Problem(m=3, n=128, k=64, group=32, experts=4, top_k=2)
    routing = scope.routing()
    assert routing is not None
    assert (routing.slots, routing.touched, routing.intermediate) == (6, 3, 64)


def test_histograms_of_blocks():
    problem = Problem(m=40, n=128, k=64, group=32, experts=4, top_k=1)
    ids = torch.tensor([0] * 20 + [2] * 16 + [3] * 3 + [-1])[:, None]
    facts = scopes.moe_facts(ids, problem, 64, TILE)
    assert facts == {
        "inter": 64,
        "n_routed": 39,
        "experts": 3,
        "block_m": 16,
        "valid_blocks": 4,
        "tok_hist": [1, 2, 1],
        "vtok_hist": [0, 0, 0, 1, 1, *[0] * 11, 2],
    }


def test_blocks_of_one_slot():
    problem = Problem(m=1, n=128, k=64, group=32, experts=4, top_k=2)
    facts = scopes.moe_facts(torch.tensor([[3, 1]]), problem, 64, TILE)
    assert (facts["block_m"], facts["valid_blocks"], facts["tok_hist"], facts["vtok_hist"]) == (1, 2, [2, 2], [0, 2])


def test_nothing_is_counted_during_a_capture(monkeypatch):
    monkeypatch.setattr(scopes, "is_capturing", lambda: True)
    problem = Problem(m=1, n=128, k=64, group=32, experts=4, top_k=2)
    assert scopes.moe_facts(torch.tensor([[3, 1]]), problem, 64, TILE) == {"inter": 64}


def test_layers_are_named_and_closed():
    layer = W4A16Linear.of(w4a16.pack(random_weight(96, 128, group=32)))
    model = nn.Sequential(nn.Sequential(layer), nn.Identity())
    x = torch.randn(1, 128, dtype=torch.bfloat16)

    def work() -> None:
        with torch.no_grad(), scopes.layers(model):
            model(x)
            with pytest.raises(Exception, match="K"):
                model(x[:, :3])

    found = names(work)
    assert found[:2] == ["layer 0", "layer 0.0"]
    assert parse(found[2]) is not None
    assert found[3] == "layer 1"
    assert names(lambda: model(x), on=False) == []


def test_a_recorded_trace_reports_every_call(tmp_path: Path):
    """From the call to the report: what `record` saw is what the trace tells."""
    weights = [w4a16.pack(random_weight(n, k, group=32, asym=n == 96)) for n, k in ((96, 128), (64, 96))]
    x = torch.randn(20, 128, dtype=torch.bfloat16)
    with record() as served, scopes.profiling(), profile(activities=[ProfilerActivity.CPU]) as p:
        for rows in (x, x[:1]):
            w4a16.linear(w4a16.linear(rows, weights[0]), weights[1])
    p.export_chrome_trace(str(tmp_path / "t.json"))
    step = step_of(read(tmp_path / "t.json"))
    told = [(c.op, c.what.problem) for c in step.calls if c.what is not None]
    assert told == served
    assert len(step.of_phase("decode").calls) > 0
