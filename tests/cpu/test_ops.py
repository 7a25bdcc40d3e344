"""w4a16::linear and w4a16::moe: shapes, fakes, compile, autocast, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch
from helpers import assert_close, random_weight
from torch import Tensor
from torch.library import opcheck

from w4a16 import BadInput, PackedWeight, layouts, linear, moe, pack, record
from w4a16.ops import linear_op, moe_op
from w4a16.reference import ACTIVATIONS, reference_linear, reference_moe

N, K = 48, 128
ACTS = [torch.bfloat16, torch.float16, torch.float32]


def make(act: torch.dtype = torch.bfloat16, *, group: int = 32, asym: bool = True, act_order: bool = False):  # type: ignore[no-untyped-def]
    weight = random_weight(N, K, group=group, asym=asym, act=act, act_order=act_order)
    return weight, pack(weight)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("lead", [(1,), (5,), (17,), (2, 3), (2, 1, 3), ()])
def test_leading_dimensions_and_bias(act: torch.dtype, lead: tuple[int, ...]) -> None:
    weight, packed = make(act)
    x, bias = torch.randn(*lead, K, dtype=act), torch.randn(N, dtype=act)
    assert_close(linear(x, packed, bias), reference_linear(x, weight, bias))


@pytest.mark.parametrize("group", [16, 32, 64, K])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_groups_zero_points_and_act_order(group: int, asym: bool, act_order: bool) -> None:
    weight, packed = make(group=group, asym=asym, act_order=act_order)
    x = torch.randn(6, K).bfloat16()
    assert_close(linear(x, packed), reference_linear(x, weight))


def test_any_strides_of_x() -> None:
    weight, packed = make()
    wide = torch.randn(2 * K, 10).bfloat16()
    for x in (wide.t()[:, :K], wide.t()[::2, K:], wide[:K].t().expand(3, 10, K)):
        assert_close(linear(x, packed), reference_linear(x, weight))


def test_no_rows() -> None:
    assert linear(torch.empty(0, K, dtype=torch.bfloat16), make()[1]).shape == (0, N)
    assert linear(torch.empty(2, 0, K, dtype=torch.bfloat16), make()[1]).shape == (2, 0, N)


def test_the_same_call_gives_the_same_bits() -> None:
    packed, x = make()[1], torch.randn(9, K).bfloat16()
    assert torch.equal(linear(x, packed), linear(x, packed))


def linear_args(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> tuple[object, ...]:
    return (x, w.codes, w.scales, w.zeros, w.perm, bias, w.layout, w.n, w.k, w.group)


@pytest.mark.parametrize("act", ACTS)
def test_opcheck_linear(act: torch.dtype) -> None:
    packed = make(act, act_order=True)[1]
    opcheck(linear_op, linear_args(torch.randn(3, K, dtype=act), packed, torch.randn(N, dtype=act)))


def moe_problem(act: torch.dtype, tokens: int, *, top_k: int = 2, gated: bool = True, asym: bool = True):  # type: ignore[no-untyped-def]
    hidden, intermediate, experts = 64, 32, 4
    w13 = random_weight((2 if gated else 1) * intermediate, hidden, group=32, asym=asym, act=act, experts=experts)
    w2 = random_weight(hidden, intermediate, group=32, asym=asym, act=act, experts=experts)
    x = torch.randn(tokens, hidden, dtype=act)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).reshape(tokens, top_k)
    return x, w13, w2, torch.rand(tokens, top_k), ids


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("asym", [False, True])
def test_moe(act: torch.dtype, tokens: int, asym: bool) -> None:
    x, w13, w2, weights, ids = moe_problem(act, tokens, asym=asym)
    got = moe(x, pack(w13), pack(w2), weights, ids)
    assert_close(got, reference_moe(x, w13, w2, weights, ids))


def test_moe_without_the_extra() -> None:
    x, w13, w2, weights, ids = moe_problem(torch.bfloat16, 40)
    packed = [layouts.pack(weight, layout=layouts.INT4PACK) for weight in (w13, w2)]
    assert_close(moe(x, *packed, weights, ids), reference_moe(x, w13, w2, weights, ids))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_moe_activations(activation: str, gated: bool) -> None:
    x, w13, w2, weights, ids = moe_problem(torch.float32, 6, gated=gated)
    got = moe(x, pack(w13), pack(w2), weights, ids, activation=activation, gated=gated)
    assert_close(got, reference_moe(x, w13, w2, weights, ids, activation=activation, gated=gated))


def test_moe_weights_on_the_input() -> None:
    x, w13, w2, weights, ids = moe_problem(torch.float32, 6, top_k=1)
    got = moe(x, pack(w13), pack(w2), weights, ids, weight_input=True)
    assert_close(got, reference_moe(x, w13, w2, weights, ids, weight_input=True))


def test_moe_skips_experts_that_live_elsewhere() -> None:
    x, w13, w2, weights, ids = moe_problem(torch.float32, 6)
    expert_map = torch.tensor([2, -1, 0, 1])
    got = moe(x, pack(w13), pack(w2), weights, ids, expert_map=expert_map)
    assert_close(got, reference_moe(x, w13, w2, weights, expert_map[ids]))


def test_moe_sentinels_and_no_tokens() -> None:
    x, w13, w2, weights, ids = moe_problem(torch.float32, 6)
    ids[0], ids[3, 1] = 4, -1
    assert_close(moe(x, pack(w13), pack(w2), weights, ids), reference_moe(x, w13, w2, weights, ids))
    assert moe(x[:0], pack(w13), pack(w2), weights[:0], ids[:0]).shape == (0, 64)


def test_opcheck_moe() -> None:
    x, w13, w2, weights, ids = moe_problem(torch.bfloat16, 6)
    a, b = (astuple(pack(w))[1:5] for w in (w13, w2))
    layout = pack(w13).layout
    opcheck(moe_op, (x, weights, ids, *a, *b, None, layout, 64, 32, 32, 32, "silu", True, False))


def test_compiled_at_one_row_count_runs_at_every_other() -> None:
    weight, packed = make()
    compiled = torch.compile(lambda x: linear(x, packed) * 2, fullgraph=True, dynamic=True)
    with record() as served:
        for m in (64, 1, 5, 17, 2, 64):
            x = torch.randn(m, K).bfloat16()
            assert_close(compiled(x), reference_linear(x, weight) * 2)
    assert [problem.m for _, problem in served] == [64, 1, 5, 17, 2, 64]
    assert len({stem for stem, _ in served}) == 2


@pytest.mark.parametrize("under", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_weights_dtype(under: torch.dtype) -> None:
    packed = make()[1]
    x = torch.randn(3, K)
    with torch.autocast("cpu", dtype=under):
        got = linear(x, packed)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, linear(x.bfloat16(), packed))


def test_autocast_moe() -> None:
    x, w13, w2, weights, ids = moe_problem(torch.bfloat16, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = moe(x.float(), pack(w13), pack(w2), weights, ids)
    assert torch.equal(got, moe(x, pack(w13), pack(w2), weights, ids))


X = torch.zeros(2, K, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: linear(X[:, 1:], w), "got 127, wanted 128"),
        (lambda w: linear(torch.tensor(1.0), w), "K"),
        (lambda w: linear(X.float(), w), "x dtype"),
        (lambda w: linear(X.to("meta"), w), "x device"),
        (lambda w: linear(X, w, torch.zeros(N + 1).bfloat16()), "bias shape"),
        (lambda w: linear(X, w, torch.zeros(N)), "bias dtype"),
        (lambda w: linear(X, make()[0]), "got QuantizedWeight, wanted PackedWeight"),
        (lambda w: linear(X, pack(moe_problem(torch.bfloat16, 2)[1])), "experts, wanted PackedWeight of one linear"),
    ],
)
def test_wrong_x_and_bias_are_named(call: Callable[[PackedWeight], Tensor], words: str) -> None:
    packed = make()[1]
    with pytest.raises(BadInput, match=words):
        call(packed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 64)}, "x dimensions"),
        ({"x": torch.zeros(2, 32)}, "last dimension"),
        ({"topk_ids": torch.zeros(6, 2)}, "topk_ids dtype"),
        ({"topk_ids": torch.zeros(6, 3, dtype=torch.int64)}, "topk_weights shape"),
        ({"x": torch.zeros(5, 64)}, "tokens"),
        ({"weight_input": True}, "weights on the input"),
        ({"gated": False}, "expert weights"),
        ({"activation": "tanhshrink"}, "activation"),
        ({"w2": make()[1]}, "got PackedWeight of one linear layer, wanted PackedWeight of experts"),
    ],
)
def test_wrong_expert_calls_are_named(change: dict[str, object], words: str) -> None:
    x, w13, w2, weights, ids = moe_problem(torch.float32, 6)
    arguments = {"x": x, "w13": pack(w13), "w2": pack(w2), "topk_weights": weights, "topk_ids": ids} | change
    with pytest.raises(BadInput, match=words):
        moe(**arguments)  # type: ignore[arg-type]
