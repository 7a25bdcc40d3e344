"""Threads, processes, copies, moves and casts of layers: the same numbers, or one clear refusal."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import assert_close, random_weight
from torch import nn

from w4a16 import BadInput, cache_dense, layouts, linear, pack, record
from w4a16.layouts import EXLLAMA, INT4PACK, SKINNY
from w4a16.nn import W4A16Experts, W4A16Linear
from w4a16.reference import reference_linear
from w4a16.weight import QuantizedWeight

N, K = 96, 256


def make_layer(
    *, layout: str = EXLLAMA, asym: bool = True, act_order: bool = False, act: torch.dtype = torch.bfloat16
) -> tuple[QuantizedWeight, W4A16Linear]:
    weight = random_weight(N, K, group=64, asym=asym, act=act, act_order=act_order)
    return weight, W4A16Linear.of(layouts.pack(weight, layout=layout), torch.randn(N).to(act))


def make_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(*(W4A16Linear.of(pack(random_weight(K, K, group=64, asym=True))) for _ in range(2)))
    net.append(W4A16Linear.of(layouts.pack(random_weight(K, K, group=64), layout=INT4PACK)))
    cache_dense(net, utilization=1.0)
    return net


def test_two_models_in_one_process_do_not_meet() -> None:
    nets, inputs = [make_net(seed) for seed in (1, 2)], [torch.randn(m, K).bfloat16() for m in (1, 17, 100)]
    alone = [[net(x) for x in inputs] for net in nets]
    for _ in range(3):
        for at, x in enumerate(inputs):
            for net, right in zip(nets, alone, strict=True):
                assert torch.equal(net(x), right[at])


@pytest.mark.parametrize("compiled", [False, True])
def test_two_threads_two_models_every_row_count(compiled: bool) -> None:
    nets, inputs = [make_net(seed) for seed in (1, 2)], [torch.randn(m, K).bfloat16() for m in (1, 5, 17, 100)]
    right = [[net(x) for x in inputs] for net in nets]
    calls = [torch.compile(net, dynamic=True, backend="aot_eager") if compiled else net for net in nets]
    start = threading.Barrier(2)

    def work(which: int) -> bool:
        start.wait()
        with torch.no_grad():
            return all(
                torch.equal(calls[which](x), y) for _ in range(10) for x, y in zip(inputs, right[which], strict=True)
            )

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))
    torch._dynamo.reset()


def test_a_record_holds_the_calls_of_its_own_thread() -> None:
    net, x = make_net(1), torch.randn(1, K).bfloat16()

    def count(_: int) -> int:
        with record() as served:
            net(x)
        return len(served)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(count, range(16))) == {3}


FORKED = """
    import os, sys
    import torch
    from helpers import random_weight
    from w4a16 import linear, pack

    def compute():
        torch.manual_seed(0)
        packed = pack(random_weight(1024, 1024, group=128))
        return [linear(torch.randn(m, 1024).bfloat16(), packed) for m in (1, 17, 100)]

    def in_a_child():
        child = os.fork()
        if child == 0:
            torch.save(compute(), sys.argv[1])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        return torch.load(sys.argv[1])

    after_import = in_a_child()
    right = compute()
    after_calls = in_a_child()
    assert all(torch.equal(a, b) for got in (after_import, after_calls) for a, b in zip(got, right))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="missing: fork")
def test_a_fork_after_import_and_one_after_calls_compute_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FORKED), str(tmp_path / "child.pt")]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, timeout=100)


@pytest.mark.parametrize("layout", [EXLLAMA, INT4PACK, SKINNY])
@pytest.mark.parametrize("act_order", [False, True])
def test_pickles_torch_saves_and_deep_copies_compute_the_same(layout: str, act_order: bool) -> None:
    _, layer = make_layer(layout=layout, act_order=act_order)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    x = torch.randn(3, K).bfloat16()
    for twin in twins:
        assert torch.equal(twin(x), layer(x))
        assert (twin.layout, twin.n, twin.k, twin.group) == (layout, N, K, 64)
        assert twin.codes.data_ptr() != layer.codes.data_ptr()  # type: ignore[union-attr]


def test_experts_pickle_and_deep_copy() -> None:
    block = W4A16Experts(4)
    block.set(pack(random_weight(64, 64, group=32, experts=4)), pack(random_weight(64, 32, group=32, experts=4)))
    x, ids, weights = torch.randn(3, 64).bfloat16(), torch.tensor([[0, 1], [3, 2], [1, 0]]), torch.rand(3, 2)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x, ids, weights), block(x, ids, weights))


@pytest.mark.parametrize("layout", [EXLLAMA, INT4PACK, SKINNY])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_into_a_layer_of_its_kind(layout: str, assign: bool) -> None:
    (weight, source), (_, layer) = make_layer(layout=layout), make_layer(layout=layout)
    layer.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(3, K).bfloat16()
    assert torch.equal(layer(x), source(x))
    assert_close(layer(x), reference_linear(x, weight, source.bias))


@pytest.mark.parametrize(
    ("into", "words"),
    [
        (W4A16Linear(K, N, bias=True), "codes: got none, wanted torch.int32. A state dict says no layout"),
        (make_layer(layout=INT4PACK)[1], r"codes: got torch.uint8 of layout INT4PACK, wanted torch.int32"),
        (make_layer(layout=SKINNY)[1], r"zeros: got torch.int32 of layout SKINNY, wanted torch.uint8"),
        (make_layer(asym=False)[1], "zeros: got none, wanted torch.uint8"),
        (make_layer(act_order=True)[1], "Missing key.*perm"),
        (W4A16Linear.of(pack(random_weight(N, K, group=32, asym=True)), torch.zeros(N)), "size mismatch for scales"),
    ],
)
def test_a_state_dict_of_another_kind_is_refused(into: W4A16Linear, words: str) -> None:
    before = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    with pytest.raises(RuntimeError, match=words):
        into.load_state_dict(make_layer()[1].state_dict())
    if into.codes is not None and "codes" in words:
        assert all(torch.equal(before[name], tensor) for name, tensor in into.state_dict().items() if name != "bias")


@pytest.mark.parametrize("layout", [EXLLAMA, INT4PACK, SKINNY])
@pytest.mark.parametrize("act", [torch.float16, torch.float32])
def test_half_and_float_compute_in_the_new_dtype(layout: str, act: torch.dtype) -> None:
    """The scales are rounded once more where fp16 cannot hold bf16's: the bound is that of the cast scales."""
    weight, layer = make_layer(layout=layout)
    layer = layer.half() if act == torch.float16 else layer.float()
    x = torch.randn(3, K).to(act)
    cast = QuantizedWeight(codes=weight.codes, scales=weight.scales.to(act), zeros=weight.zeros, group=64)
    assert_close(layer(x), reference_linear(x, cast, layer.bias))
    assert layer.layout == EXLLAMA  # what the kernels of the new dtype read


def test_a_dtype_without_kernels_is_refused_by_the_call() -> None:
    layer = make_layer()[1].double()
    with pytest.raises(BadInput, match=r"scales dtype: got torch\.float64, wanted bfloat16, float16 or float32"):
        layer(torch.randn(3, K).double())


def test_a_move_packs_for_the_new_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a CPU to a GPU: the weight is packed anew where the layout is another, and else moved as it is."""
    weight, layer = make_layer()
    monkeypatch.setattr("w4a16.nn.layout_of", lambda weight, device, act: SKINNY)
    monkeypatch.setattr(
        "w4a16.nn.pack", lambda plain, device, act: layouts.pack(plain, layout=SKINNY, act=act).to(device)
    )
    layer.half()
    assert layer.layout == SKINNY
    again = layer.codes
    layer.float()
    assert torch.equal(layer.codes, again)  # type: ignore[arg-type]
    x = torch.randn(3, K)
    assert_close(layer(x), reference_linear(x, weight, layer.bias))


def test_the_meta_device_holds_a_layer_that_says_what_it_needs() -> None:
    layer = make_layer()[1].to("meta")
    assert layer.codes is not None
    assert layer.codes.device.type == "meta"
    assert layer(torch.empty(3, K, dtype=torch.bfloat16, device="meta")).shape == (3, N)


def test_x_on_another_device_is_named() -> None:
    with pytest.raises(BadInput, match="x device: got meta, wanted cpu"):
        linear(torch.empty(1, K, dtype=torch.bfloat16, device="meta"), make_layer()[1].get())
