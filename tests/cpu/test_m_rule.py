"""The kernel follows the row count of the call, not of the trace: compiled in every mode, exported, in any order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_weight, relative_rms
from m_rule import ORDERS, ROWS, TRACED, ran, rows, wanted
from torch import nn
from torch._dynamo.utils import counters

from w4a16 import layouts, record
from w4a16.dense_cache import make_copy
from w4a16.layouts import EXLLAMA, INT4PACK
from w4a16.nn import W4A16Linear
from w4a16.tuning.tiles import ResidentTile

K = 64


def make_net() -> nn.Sequential:
    """A weight with a dense copy, one with none whose prefill is `dense`, and one in the layout of the JIT kernels."""
    cached, scratch, jit = (
        W4A16Linear.of(layouts.pack(random_weight(K, K, group=32, asym=True), layout=layout))
        for layout in (INT4PACK, INT4PACK, EXLLAMA)
    )
    cached.dense = make_copy(cached.get(), ResidentTile(dtype="fp32"))
    return nn.Sequential(cached, scratch, jit)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny calls
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def agree(got: torch.Tensor, net: nn.Module, x: torch.Tensor) -> None:
    assert relative_rms(got, net(x)) < 1e-6


def test_the_net_meets_every_kind_of_kernel() -> None:
    net = make_net()
    assert wanted(net, 1) == ["cpu_int4pack", "cpu_int4pack", "cpu_decode"]
    assert wanted(net, TRACED) == ["dense_resident", "dense", "cpu_prefill"]


CASES = [("default", torch.no_grad), ("default", torch.inference_mode), ("default", nullcontext)]
CASES += [(mode, torch.no_grad) for mode in ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")]


@pytest.mark.parametrize(("mode", "grad"), CASES)
def test_compiled_at_2048_every_call_runs_what_choose_names(mode: str, grad: Callable[[], Any]) -> None:
    """One graph, no break, no second compilation, by the labels of a profiler."""
    net = make_net()
    compiled = torch.compile(net, mode=mode, dynamic=True, fullgraph=True)
    calls = [TRACED, *(m for order in ORDERS[::40] for m in order)]
    inputs = {m: rows(m, K) for m in ROWS}
    with grad(), ran() as found:
        results = [compiled(inputs[m]) for m in calls]
    assert found == [(stem, m) for m in calls for stem in wanted(net, m)]
    first = dict(zip(reversed(calls), reversed(results), strict=True))
    assert all(torch.equal(first[m], got) for m, got in zip(calls, results, strict=True))
    for m in ROWS:
        agree(first[m], net, inputs[m])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@torch.no_grad()
def test_every_order_of_every_row_count() -> None:
    net = make_net()
    compiled = torch.compile(net, dynamic=True, fullgraph=True)
    inputs = {m: rows(m, K) for m in ROWS}
    right = {m: compiled(inputs[m]) for m in (TRACED, *ROWS)}
    names = {m: wanted(net, m) for m in ROWS}
    for order in ORDERS:
        with record() as served:
            assert all(torch.equal(compiled(inputs[m]), right[m]) for m in order)
        assert [(stem, p.m) for stem, p in served] == [(stem, m) for m in order for stem in names[m]]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dynamic", [True, None])
def test_no_more_graphs_than_a_dense_linear_costs(dynamic: bool | None) -> None:
    """torch itself makes a case of M=1 (and, unless told that M varies, of the first M): ours adds none to that."""
    graphs = []
    for net in (nn.Sequential(*(nn.Linear(K, K, bias=False).bfloat16() for _ in range(3))), make_net()):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(net, dynamic=dynamic, fullgraph=True, backend="aot_eager")
        with torch.no_grad(), ran() as found:
            for m in (TRACED, 1, 5, 6, 17, TRACED):
                agree(compiled(x := torch.randn(m, K).bfloat16()), net, x)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]
    # each M twice: compiled and eager
    assert found == [(stem, m) for m in (TRACED, 1, 5, 6, 17, TRACED) for _ in range(2) for stem in wanted(net, m)]


def test_a_copy_made_after_compilation_is_used() -> None:
    net = make_net()
    compiled = torch.compile(net, dynamic=True, fullgraph=True, backend="aot_eager")
    x = torch.randn(TRACED, K).bfloat16()
    before = compiled(x)
    net[1].dense = make_copy(net[1].get(), ResidentTile(dtype="fp32"))  # type: ignore[arg-type]
    with ran() as found:
        after = compiled(x)
    assert [stem for stem, _ in found] == ["dense_resident", "dense_resident", "cpu_prefill"]
    assert relative_rms(after, before) < 4e-3


def test_aot_inductor_runs_what_choose_names(tmp_path: Path) -> None:
    """Exported at M=2048 and compiled ahead of time; the copy goes along as a constant."""
    net = make_net().eval()
    with torch.no_grad():
        x = torch.randn(TRACED, K).bfloat16()
        exported = torch.export.export(copy_of(net), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        settings = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "net.pt2"), inductor_configs=settings
        )
        run = torch._inductor.aoti_load_package(package)
        for m in (*ROWS, 5, 1):
            with ran() as found:
                got = run(x := torch.randn(m, K).bfloat16())
            assert found == [(stem, m) for stem in wanted(net, m)]
            agree(got, net, x)


def copy_of(net: nn.Module) -> nn.Module:
    """A deep copy that keeps the dense copies."""
    twin = copy.deepcopy(net)
    for ours, theirs in zip(net.modules(), twin.modules(), strict=True):
        if isinstance(ours, W4A16Linear):
            theirs.dense = ours.dense
    return twin
