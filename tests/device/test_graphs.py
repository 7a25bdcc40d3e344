"""The M rule on a GPU: compiled in every mode, in CUDA graphs, in any order, the kernel follows the row count.

PYTHONPATH=src:tests/cpu python -m pytest tests/device/test_graphs.py

Without `-n`: beside pytest's other workers the free memory of the GPU tells nothing of one process. There, of the two
tests that are about it, one compares what torch holds instead and the other is skipped.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_close, random_weight, relative_rms
from m_rule import ORDERS, ROWS, TRACED, ran, wanted
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from w4a16 import KernelFailed, OverBudget, cache_dense, layouts, linear, ops, pack, report
from w4a16.dense_cache import copy_plan, make_copy
from w4a16.device import free_and_total, within_memory
from w4a16.dispatch import choose, serve_linear
from w4a16.dispatch_table import TABLE
from w4a16.kernels import _launch
from w4a16.layouts import SKINNY
from w4a16.nn import W4A16Linear
from w4a16.reference import reference_linear
from w4a16.tuning import table
from w4a16.tuning.table import TuningRow
from w4a16.tuning.tiles import DenseTile, ResidentTile

N = 1024
STEMS = tuple({row.stem for row in TABLE} | {"dense_rows"})
BLAS = ("gemm", "nvjet", "cutlass", "Cijk", "ampere_", "sm90_xmma")
ALONE = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1"  # on the GPU, as far as pytest knows
BOUND = 4e-3  # BLAS may split K otherwise in a graph, where its workspace is another


def tuned_row(stem: str, tile: object) -> TuningRow:
    return TuningRow(
        stem=stem, table="test", place=1, tile=tile, why="", measured="", use=True, conditions={"m_min": 65}
    )


ADDED = (tuned_row("dense_resident", ResidentTile()), tuned_row("dense", DenseTile(workspace_mib=1, first=True)))


@pytest.fixture
def dense_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tuning rows that hand 65 rows of x and more to BLAS."""
    real = table.device_rows

    def rows(stem: str, device: object) -> Iterator[TuningRow]:
        yield from (row for row in ADDED if row.stem == stem)
        yield from real(stem, device)  # type: ignore[arg-type]

    monkeypatch.setattr("w4a16.tuning.table.device_rows", rows)
    monkeypatch.setattr("w4a16.dense_cache.device_rows", rows)
    forget()
    yield
    forget()


@pytest.fixture(params=["as tuned", "dense first"])
def choices(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dispatch as it is, and with the rows above."""
    if request.param == "dense first":
        request.getfixturevalue("dense_first")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forget() -> None:
    ops._repeats.clear()
    for cache in (choose, serve_linear, copy_plan):
        cache.cache_clear()


def make_net() -> nn.Sequential:
    """A weight with a dense copy, one as this GPU packs it, and one in the layout of the portable kernels."""
    plain = [random_weight(N, N, group=128, asym=asym) for asym in (False, True, True)]
    cached, own = (W4A16Linear.of(pack(weight, device="cuda")) for weight in plain[:2])
    cached.dense = make_copy(cached.get(), ResidentTile())
    portable = W4A16Linear.of(layouts.pack(plain[2], layout=SKINNY).to("cuda"))
    return nn.Sequential(cached, own, portable)


def kernels(work: Callable[[], object]) -> set[str]:
    """Which of our kernels the GPU ran, replayed graphs included, and `BLAS` when there was a product of it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    names = [event.name for event in trace.events() if event.device_type == DeviceType.CUDA]
    found = {stem for stem in STEMS for name in names if name.lstrip("_").startswith(stem)}
    return found | ({"BLAS"} if any(word in name for name in names for word in BLAS) else set())


@pytest.mark.usefixtures("choices")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@torch.no_grad()
def test_compiled_at_2048_in_any_order(mode: str) -> None:
    """Replays run no Python, so what the GPU ran tells: the kernels of the eager call with as many rows."""
    counters.clear()
    net = make_net()
    inputs = {m: torch.randn(m, N, device="cuda").bfloat16() for m in ROWS}
    right = {m: net(x) for m, x in inputs.items()}
    eager = {m: kernels(lambda x=x: net(x)) for m, x in inputs.items()}
    compiled = torch.compile(net, mode=mode, dynamic=True, fullgraph=True)

    def call(m: int) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        out: torch.Tensor = compiled(inputs[m])
        return out.clone()

    for m in (TRACED, *(m for order in ORDERS[::12] for m in order)):
        assert relative_rms(call(m), right[m]) < BOUND
    for m in ROWS:
        assert kernels(lambda m=m: call(m)) == eager[m]
    assert counters["stats"]["unique_graphs"] <= 2  # torch's own: M=1 is a case of its own
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.usefixtures("choices")
@torch.no_grad()
def test_eager_runs_what_choose_names() -> None:
    net = make_net()
    for order in ORDERS[::20]:
        with ran() as found:
            for m in order:
                net(torch.randn(m, N, device="cuda").bfloat16())
        assert found == [(stem, m) for m in order for stem in wanted(net, m)]


@pytest.mark.usefixtures("dense_first")
def test_the_rows_of_this_test_reach_both_forms() -> None:
    net = make_net()
    assert wanted(net, TRACED)[0] == "dense_resident"
    assert wanted(net, TRACED)[2] == "dense"
    assert not {"dense", "dense_resident"} & {stem for m in (1, 5, 16, 17) for stem in wanted(net, m)}


@pytest.mark.usefixtures("choices")
@torch.inference_mode()
def test_one_captured_graph_a_row_count_in_every_order() -> None:
    net = make_net()
    inputs = {m: torch.randn(m, N, device="cuda").bfloat16() for m in ROWS}
    graphs, outs = {}, {}
    for m in (TRACED, *ROWS[:-1]):
        net(inputs[m])
        torch.cuda.synchronize()
        graphs[m] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[m]):
            outs[m] = net(inputs[m])
    for order in ORDERS:
        for m in order:
            inputs[m].copy_(torch.randn(m, N))
            graphs[m].replay()
        m = order[-1]
        assert relative_rms(outs[m], net(inputs[m])) < BOUND
    for m in ROWS:
        assert kernels(graphs[m].replay) == kernels(lambda m=m: net(inputs[m]))


@pytest.mark.usefixtures("dense_first")
@torch.no_grad()
def test_a_copy_made_after_calls_is_used_and_one_dropped_is_not() -> None:
    """Calls that were made before are launched again without asking dispatch: a copy makes another call of them."""
    net, x = make_net(), torch.randn(100, N, device="cuda").bfloat16()
    cached, own = net[0], net[1]
    assert isinstance(cached, W4A16Linear)
    assert isinstance(own, W4A16Linear)
    for _ in range(3):
        own(x)
        cached(x)
    own.dense = make_copy(own.get(), ResidentTile())
    cached.drop_dense("the test")
    with ran() as found:
        own(x)
        cached(x)
    assert [stem == "dense_resident" for stem, _ in found] == [True, False]
    assert "BLAS" in kernels(lambda: own(x))
    if cached.layout != SKINNY:  # whose scratch form is BLAS too
        assert "BLAS" not in kernels(lambda: cached(x))


@pytest.mark.usefixtures("choices")
@pytest.mark.parametrize("act_order", [False, True])
def test_both_dense_forms_are_the_reference(act_order: bool) -> None:
    weight, bias = random_weight(N, 512, group=64, asym=True, act_order=act_order), torch.randn(N).bfloat16()
    layer = W4A16Linear.of(layouts.pack(weight, layout=SKINNY).to("cuda"), bias.cuda())
    for _ in range(2):
        for m in (5, 65, 300):
            x = torch.randn(m, 512).bfloat16()
            assert_close(layer(x.cuda()).cpu(), reference_linear(x, weight, bias))
        layer.dense = make_copy(layer.get(), ResidentTile(pad_bytes=128))


@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [(264, 4096, 128), (24, 1152, 64), (40, 96, 24), (8, 64, 8)])
def test_a_copy_holds_the_bits_of_dequantising_in_torch(
    act: torch.dtype, asym: bool, n: int, k: int, group: int
) -> None:
    weight = random_weight(n, k, group=group, asym=asym, act=act)
    packed = layouts.pack(weight, layout=SKINNY).to("cuda")
    for each in (packed, layouts.pad_rows(packed)):
        assert torch.equal(make_copy(each, ResidentTile()).cpu(), weight.dequantize())


@pytest.mark.usefixtures("dense_first")
def test_load_unload_reload_returns_to_the_same_free_memory() -> None:
    """Of the whole GPU where no other worker of pytest is on it, and of what torch holds anywhere."""
    plain = random_weight(4096, 4096, group=128, asym=True)
    left = []
    for _ in range(3):
        net = nn.Sequential(*(W4A16Linear.of(pack(plain, device="cuda")) for _ in range(4)))
        found = cache_dense(net, policy="hard", utilization=0.95)
        assert found.bytes["dense copies"] == 4 * 2 * 4096 * 4096
        net(torch.randn(100, 4096, device="cuda").bfloat16())
        del net
        gc.collect()
        free, _ = free_and_total("cuda")  # torch gives back what it keeps for later
        left.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free if ALONE else None))
    assert left[0] == left[1] == left[2]


@pytest.mark.skipif(not ALONE, reason="missing device: a GPU to itself; run without -n")
@pytest.mark.usefixtures("dense_first")
def test_the_budget_is_kept_on_real_memory() -> None:
    """As many copies as fit above a floor that is set one and a half copies below what is free."""
    net = nn.Sequential(*(W4A16Linear.of(pack(random_weight(8192, 8192, group=128), device="cuda")) for _ in range(3)))
    size = 2 * 8192 * 8192
    free, total = free_and_total("cuda")
    utilization = 1 - (free - 1.5 * size) / total
    with pytest.warns(UserWarning, match="2 of 3 dense copies do not fit"):
        found = cache_dense(net, utilization=utilization)
    assert [line.copy_bytes for line in found.lines] == [size, 0, 0]
    with pytest.raises(OverBudget, match=r"134\.2 MB wanted"):
        cache_dense(net, policy="hard", utilization=utilization)


@pytest.mark.usefixtures("choices")
def test_two_threads_two_models_four_streams() -> None:
    nets = [make_net() for _ in range(2)]
    inputs = [torch.randn(m, N, device="cuda").bfloat16() for m in (1, 5, 17, 100, 300)]
    right = [[net(x) for x in inputs] for net in nets]
    torch.cuda.synchronize()
    start = threading.Barrier(2)

    def work(which: int) -> bool:
        streams = [torch.cuda.Stream() for _ in range(2)]
        start.wait()
        results = []
        for turn in range(50):
            with torch.cuda.stream(streams[turn % 2]), torch.no_grad():
                results.append((turn % len(inputs), nets[which](inputs[turn % len(inputs)])))
        torch.cuda.synchronize()
        return all(relative_rms(got, right[which][at]) < BOUND for at, got in results)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


@pytest.mark.parametrize("asym", [False, True])
def test_moves_between_devices_pack_anew_and_copies_compute_the_same(asym: bool) -> None:
    weight = random_weight(N, N, group=128, asym=asym)
    layer = W4A16Linear.of(pack(weight, device="cuda"))
    x = torch.randn(3, N).bfloat16()
    right, layout = layer(x.cuda()), layer.layout
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x.cuda()), right)
    layer.to("cpu")
    assert layer.layout == pack(weight).layout
    assert_close(layer(x), reference_linear(x, weight))
    layer.to("cuda")
    assert layer.layout == layout
    assert torch.equal(layer(x.cuda()), right)
    layer.half()
    got = layer(x.half().cuda()).cpu()
    assert relative_rms(got, reference_linear(x, weight)) < BOUND
    assert report(layer).bytes["dense copies"] == 0


def test_running_out_of_memory_is_one_message_and_the_next_load_works() -> None:
    plain = random_weight(8192, 4096, group=128, asym=True)
    gc.collect()
    _, total = free_and_total("cuda")
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    try:
        with (
            pytest.raises(OverBudget, match="one layer: got out of memory on cuda"),
            within_memory("one layer", "cuda"),
        ):
            pack(plain, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    x = torch.randn(3, 4096).bfloat16()
    assert_close(linear(x.cuda(), pack(plain, device="cuda")).cpu(), reference_linear(x, plain))


def test_a_kernel_that_does_not_compile_is_one_message_and_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(136, 640, group=128, asym=True)  # sizes of no other test: nothing is compiled for them
    packed, x = layouts.pack(weight, layout=SKINNY).to("cuda"), torch.randn(37, 640).bfloat16()
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(ops, "_repeats", {})

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("ptxas said no")

    with monkeypatch.context() as patch:
        patch.setattr(_launch, "launcher", fail)
        with pytest.raises(KernelFailed, match="ptxas said no"):
            linear(x.cuda(), packed)
    assert_close(linear(x.cuda(), packed).cpu(), reference_linear(x, weight))
