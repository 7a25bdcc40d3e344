"""Labels: written and read back; the FLOPs and bytes behind them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w4a16.device import DEVICES
from w4a16.problem import Problem
from w4a16.roofline.labels import label, parse
from w4a16.roofline.model import Routing, bytes_moved, cost, dense_cost, flops, weight_bytes

DECODE = Problem(m=1, n=24576, k=4096, group=128, has_zeros=True)
MOE = Problem(m=16, n=1536, k=2048, group=128, experts=128, top_k=8)


def test_a_linear_label():
    assert label("sm90_decode", DECODE) == "sm90_decode 1x24576x4096 g=128 asym"


def test_an_expert_label_with_its_histograms():
    text = label("triton_moe", MOE, inter=768, block_m=2, valid_blocks=80, n_routed=128, tok_hist=[51, 74, 3])
    assert text == (
        "triton_moe 16x1536x2048 E=128 top_k=8 g=128 sym inter=768 block_m=2 valid_blocks=80 n_routed=128"
        " tok_hist=51,74,3"
    )
    scope = parse(text)
    assert scope is not None
    assert scope.problem == MOE
    assert scope.routing() == Routing(slots=128, touched=77, rows=160, intermediate=768)


@given(
    m=st.integers(0, 1 << 20),
    n=st.integers(1, 1 << 18),
    groups=st.integers(1, 64),
    group=st.sampled_from([16, 32, 64, 128, 4096]),
    act=st.sampled_from(["bf16", "fp16", "fp32"]),
    has_zeros=st.booleans(),
    experts=st.integers(0, 256),
)
def test_every_label_reads_back(m, n, groups, group, act, has_zeros, experts):
    problem = Problem(
        m=m, n=n, k=groups * group, group=group, act=act, has_zeros=has_zeros, experts=experts, top_k=min(experts, 2)
    )
    scope = parse(label("gfx11_prefill", problem))
    assert scope is not None
    assert (scope.stem, scope.problem, scope.facts) == ("gfx11_prefill", problem, {})


@pytest.mark.parametrize(
    "name",
    [
        "aten::mm",
        "ProfilerStep#3",
        "sm90_decode",
        "sm90_decode 1x2x3",  # no group: its bytes would be a guess
        "sm90_decode 1x64x96 g=64 sym",  # 64 does not divide 96
        "sm90_decode 1x64x64 g=64 sym what",
        "moe 1x64x64 E=4 top_k=5 g=64",
        "sm90_decode 1x64x64 g=0",
    ],
)
def test_other_ranges_are_not_labels(name):
    assert parse(name) is None


def test_a_label_of_other_tools_reads():
    scope = parse("fused_moe_wvsplitk_int4 1x1024x2048 E=256 top_k=8 g=128 sym experts=8")
    assert scope is not None
    assert scope.routing() == Routing(slots=8, touched=8, rows=8)


def test_linear_bytes_count_scales_and_packed_zeros():
    codes, groups = 24576 * 4096 // 2, 24576 * 32
    assert weight_bytes(DECODE) == codes + 2 * groups + groups // 2
    assert bytes_moved(DECODE) == weight_bytes(DECODE) + 2 * (4096 + 24576)
    assert flops(DECODE) == 2 * 24576 * 4096


def test_expert_bytes_count_the_experts_touched():
    """Decode of one token: 8 of 256 experts are read, not one and not all."""
    problem = Problem(m=1, n=1024, k=2048, group=128, experts=256, top_k=8)
    one = 1024 * 2048 // 2 + 2 * 1024 * 16
    assert weight_bytes(problem) == 8 * one
    assert weight_bytes(problem, Routing(slots=8, touched=3, rows=8)) == 3 * one
    assert bytes_moved(problem) == 8 * one + 2 * (2048 + 8 * 1024)
    assert flops(problem) == 2 * 8 * 1024 * 2048


def test_an_expert_layer_is_two_gemms():
    routing = Routing(slots=128, touched=77, rows=160, intermediate=768)
    up, down = 1536 * 2048 // 2 + 2 * 1536 * 16, 2048 * 768 // 2 + 2 * 2048 * 6
    assert weight_bytes(MOE, routing) == 77 * (up + down)
    assert bytes_moved(MOE, routing) == 77 * (up + down) + 2 * 2 * 16 * 2048
    assert flops(MOE, routing) == 2 * 128 * 2048 * (1536 + 768)


def test_channel_wise_experts_have_one_scale_a_row_in_both_gemms():
    problem = Problem(m=1, n=1536, k=2048, group=2048, experts=8, top_k=1)
    routing = Routing(slots=1, touched=1, rows=1, intermediate=768)
    assert weight_bytes(problem, routing) == 1536 * 2048 // 2 + 2 * 1536 + 2048 * 768 // 2 + 2 * 2048


def test_what_binds():
    h100 = DEVICES["sm90"]
    seconds, binds = cost(DECODE).bound(h100)
    assert binds == "memory"
    assert seconds == pytest.approx(bytes_moved(DECODE) / 3.35e12)
    seconds, binds = dense_cost(1, 8192, 8192, 8192, 2).bound(h100)
    assert binds == "compute"
    assert seconds == pytest.approx(2 * 8192**3 / 989e12)
    assert cost(DECODE).bound(DEVICES["cpu"]) == (0.0, "")
