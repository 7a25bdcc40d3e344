"""Dense copies: made under the budget and no further, reported, and gone with what they were made for."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from helpers import assert_close, random_weight
from torch import nn

import w4a16
from models import RECIPES, make_checkpoint
from w4a16 import DEVICES, BadInput, OverBudget, Problem, cache_dense, layouts, record, report
from w4a16.dense_cache import copy_plan, describe_copy, make_copy
from w4a16.dispatch import choose
from w4a16.layouts import INT4PACK
from w4a16.nn import W4A16Experts, W4A16Linear
from w4a16.reference import reference_linear
from w4a16.tuning.tiles import ResidentTile

N, K = 128, 256
COPY = 4 * N * K  # fp32 on a CPU
TOTAL = 100 * COPY


def layer(*, asym: bool = True, act_order: bool = False) -> W4A16Linear:
    """INT4PACK: the layout whose prefill a dense copy speeds up on a CPU."""
    weight = random_weight(N, K, group=64, asym=asym, act_order=act_order)
    return W4A16Linear.of(layouts.pack(weight, layout=INT4PACK))


def model(count: int = 5) -> nn.Sequential:
    return nn.Sequential(*(layer() for _ in range(count)))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A memory of TOTAL bytes of which room[0] copies' worth is free before any is made; room[1:] counts the looks."""
    room = [2]
    kept: list[weakref.ref[torch.Tensor]] = []

    def look(device: object) -> tuple[int, int]:
        room.append(0)
        return room[0] * COPY - sum(COPY for ref in kept if ref() is not None), TOTAL

    def make(*arguments: object) -> torch.Tensor:
        made = make_copy(*arguments)  # type: ignore[arg-type]
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr("w4a16.dense_cache.free_and_total", look)
    monkeypatch.setattr("w4a16.dense_cache.make_copy", make)
    return room


def cached(net: nn.Module) -> list[bool]:
    return [m.dense is not None for m in net.modules() if isinstance(m, W4A16Linear)]


@pytest.mark.parametrize(
    ("copies_free", "utilization", "kept"), [(2, 1.0, 2), (2, 0.995, 1), (2, 0.99, 1), (9, 1.0, 5)]
)
def test_the_budget_is_the_formula(room: list[int], copies_free: int, utilization: float, kept: int) -> None:
    """free - total * (1 - utilization) >= bytes, looked at anew for each weight, in load order."""
    room[0] = copies_free
    net = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache_dense(net, utilization=utilization)
    assert cached(net) == [True] * kept + [False] * (5 - kept)
    assert len(room) - 1 == 5


def test_soft_warns_once_and_keeps_four_bits(room: list[int]) -> None:
    net = model()
    with pytest.warns(
        UserWarning, match=r"3 of 5 dense copies do not fit into 1\.0 of the memory \(first 2\)"
    ) as caught:
        found = cache_dense(net, utilization=1.0)
    assert len(caught) == 1
    assert [line.copy_bytes for line in found.lines] == [COPY, COPY, 0, 0, 0]
    assert found.lines[0].why == "serves 65 rows and more"
    assert found.lines[2].why.startswith("over budget: 0.1 MB wanted, 0.0 MB left of 1.0 x 13.1 MB")
    assert found.bytes["dense copies"] == 2 * COPY
    x = torch.randn(100, K).bfloat16()
    with record() as served:
        for each in net:
            each(x)
    assert [stem for stem, _ in served] == ["dense_resident"] * 2 + ["dense"] * 3


def test_hard_raises_the_numbers_and_leaves_nothing(room: list[int]) -> None:
    net = model()
    with pytest.raises(OverBudget, match=r"dense copy of 2: 0\.1 MB wanted, 0\.0 MB left of 1\.0 x 13\.1 MB.*policy="):
        cache_dense(net, policy="hard", utilization=1.0)
    assert not any(cached(net))
    room[0] = 5
    assert cache_dense(net, policy="hard", utilization=1.0).bytes["dense copies"] == 5 * COPY


def test_off_frees_and_again_makes_the_rest(room: list[int]) -> None:
    net, room[0] = model(), 5
    cache_dense(net, utilization=1.0)
    before = net[0].dense
    assert cache_dense(net, utilization=1.0).bytes["dense copies"] == 5 * COPY
    assert net[0].dense is before
    del before
    found = cache_dense(net, policy="off")
    assert found.bytes["dense copies"] == 0
    assert found.lines[0].why == "dropped: policy off"


def test_copies_go_with_the_module_and_a_reload_finds_the_room_again(room: list[int]) -> None:
    for _ in range(3):
        net = model(2)
        cache_dense(net, policy="hard", utilization=1.0)
        copies = [weakref.ref(each.dense) for each in net]
        del net
        gc.collect()
        assert all(ref() is None for ref in copies)


def test_out_of_memory_while_copying_is_over_budget(room: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no block is large enough")

    monkeypatch.setattr("w4a16.dense_cache.make_copy", fail)
    net = model(1)
    with pytest.warns(UserWarning, match="do not fit"):
        assert "not in one piece" in cache_dense(net, utilization=1.0).lines[0].why
    with pytest.raises(OverBudget, match="not in one piece"):
        cache_dense(net, policy="hard", utilization=1.0)


@pytest.mark.parametrize(("arguments", "words"), [({"policy": "on"}, "policy"), ({"utilization": 0.0}, "utilization")])
def test_wrong_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        cache_dense(model(1), **arguments)  # type: ignore[arg-type]


def test_the_real_memory_is_read() -> None:
    net = model(1)
    assert cache_dense(net, utilization=0.999).bytes["dense copies"] in (0, COPY)
    free, total = w4a16.device.free_and_total("cpu")
    assert 0 < free < total


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_copy_gives_the_reference(asym: bool, act_order: bool, bias: bool) -> None:
    weight = random_weight(N, K, group=64, asym=asym, act_order=act_order)
    b = torch.randn(N).bfloat16() if bias else None
    net = W4A16Linear.of(layouts.pack(weight, layout=INT4PACK), b)
    cache_dense(net, utilization=1.0)
    x = torch.randn(100, K).bfloat16()
    with record() as served:
        assert_close(net(x), reference_linear(x, weight, b))
    assert [stem for stem, _ in served] == ["dense_resident"]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("pad", [0, 128])
def test_a_copy_is_the_weight_in_every_layout(layout: str, pad: int) -> None:
    weight = random_weight(64, 1024, group=128, asym=True)
    made = make_copy(layouts.pack(weight, layout=layout), ResidentTile(pad_bytes=pad))
    assert torch.equal(made, weight.dequantize())
    assert made.stride(0) == 1024 + pad // 2


def test_where_the_fused_kernel_is_as_fast_there_is_none() -> None:
    weight = random_weight(N, K, group=64)
    net = W4A16Linear.of(layouts.pack(weight))  # EXLLAMA: cpu_prefill serves
    assert cache_dense(net).lines[0].why == "none: no tuning row of cpu makes it faster than the 4-bit kernels"
    assert net.dense is None


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("act", ["bf16", "fp16"])
def test_decode_never_reads_a_copy(device: object, act: str) -> None:
    for m in (1, 5, 16):
        problem = Problem(m=m, n=4096, k=4096, group=128, act=act, resident=True)
        assert choose(problem, device).row.stem != "dense_resident"  # type: ignore[arg-type]


def test_the_choice_depends_on_m_alone() -> None:
    """Once a copy serves M rows it serves every larger M, whatever N and K."""
    device = DEVICES["gfx1151"]
    for n, k in ((4096, 4096), (24576, 4096), (4096, 18944)):
        problem = Problem(m=1, n=n, k=k, group=128)
        plan = copy_plan(problem, device)
        assert plan is not None
        assert plan.bytes == 2 * n * (k + (64 if k % 1024 == 0 else 0))
        for m in (1, 16, 17, plan.first_m - 1, plan.first_m, 4096):
            stem = choose(Problem(m=m, n=n, k=k, group=128, resident=True), device).row.stem
            assert (stem == "dense_resident") == (m >= plan.first_m)
    assert "would serve 256 rows and more, with 34.1 MB beside 8.7 MB packed" in describe_copy(
        Problem(m=1, n=4096, k=4096, group=128), device
    )


def test_whatever_changes_the_weight_its_place_or_dtype_drops_the_copy() -> None:
    net = layer()
    for change, why in (
        (lambda: net.half(), "moved or cast"),
        (lambda: net.to(torch.float32), "moved or cast"),
        (lambda: net.double(), "moved or cast"),
        (lambda: net.set(layer().get()), "another weight"),
        (lambda: net.load_state_dict(net.state_dict()), "other weights were loaded"),
    ):
        net.set(layer().get())
        net.dense = make_copy(net.get(), ResidentTile())
        change()
        assert net.dense is None
        assert why in net.dense_why
    net.dense = kept = make_copy(net.get(), ResidentTile())
    assert net.to("cpu").dense is kept


def test_copies_of_the_module_hold_no_copy_of_the_weight() -> None:
    net = layer()
    cache_dense(net, utilization=1.0)
    x = torch.randn(100, K).bfloat16()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert net.dense is not None
        assert twin.dense is None
        assert "dense" not in twin.state_dict()
        assert_close(twin(x), net(x).float())


def test_a_layer_that_no_kernel_serves_is_left_alone() -> None:
    net = nn.Sequential(layer().double(), layer().to("meta"), W4A16Linear(K, N))
    assert [line.copy_bytes for line in cache_dense(net, policy="hard").lines] == [0, 0]


def test_the_report_covers_experts_and_the_rest() -> None:
    net = nn.ModuleDict({"head": nn.Linear(8, 8), "experts": W4A16Experts(4), "proj": layer()})
    w13, w2 = random_weight(64, 64, group=32, experts=4), random_weight(64, 32, group=32, experts=4)
    net["experts"].set(w4a16.pack(w13), w4a16.pack(w2))  # type: ignore[operator]
    cache_dense(net, utilization=1.0)
    found = report(net)
    assert [line.name for line in found.lines] == ["experts.w13", "experts.w2", "proj"]
    assert found.bytes["other"] == 4 * 72
    assert found.bytes["packed"] == sum(line.packed_bytes for line in found.lines)
    assert "dense copies 0.1 MB" in str(found)


def test_load_asks_and_the_model_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model", dtype="bfloat16")
    monkeypatch.setattr("w4a16.dispatch_table.installed", lambda module: False)
    choose.cache_clear()
    copy_plan.cache_clear()
    try:
        net = w4a16.load(str(made.folder), dense_cache="soft", memory_utilization=1.0)
        assert all(line.copy_bytes for line in net.w4a16_report().lines)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
        assert not twin.w4a16_report().bytes["dense copies"]
        assert not w4a16.load(str(made.folder)).w4a16_report().bytes["dense copies"]
        gone = [weakref.ref(net), weakref.ref(net.model.layers[0].self_attn.q_proj.dense)]
        del net
        assert all(ref() is None for ref in gone)  # at once, not at some collection
        monkeypatch.setattr("w4a16.env.DENSE_CACHE", "soft")
        assert w4a16.load(str(made.folder), memory_utilization=1.0).w4a16_report().bytes["dense copies"]
        monkeypatch.setattr("w4a16.env.MEMORY_UTILIZATION", "most")
        with pytest.raises(BadInput, match="W4A16_MEMORY_UTILIZATION: got 'most', wanted a number"):
            w4a16.load(str(made.folder))
    finally:
        choose.cache_clear()
        copy_plan.cache_clear()
