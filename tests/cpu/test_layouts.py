"""Layouts: unpack(pack(q)) == q, and each is what its definition says."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight

from w4a16 import Unsupported, layouts, pack, unpack
from w4a16.layouts import EXLLAMA, EXLLAMA_ORDER, INT4PACK
from w4a16.weight import QuantizedWeight, unpack_nibbles


def assert_same(got: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert got.group == wanted.group
    for name in ("codes", "scales", "zeros", "perm"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("layout", [EXLLAMA, INT4PACK])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 32, 32), (16, 64, 32), (72, 256, 128), (40, 512, 512)])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("experts", [0, 3])
def test_round_trip(layout: str, n: int, k: int, group: int, asym: bool, experts: int) -> None:
    weight = random_weight(n, k, group=group, asym=asym, experts=experts, act_order=True)
    packed = layouts.pack(weight, layout=layout)
    assert (packed.layout, packed.n, packed.k, packed.experts) == (layout, n, k, experts)
    assert_same(unpack(packed), weight)


def test_exllama_words_hold_pairs_as_two_lanes() -> None:
    weight = random_weight(4, 16, group=16)
    codes, words = unpack_nibbles(weight.codes), layouts.pack(weight, layout=EXLLAMA).codes
    for p in range(4):
        lanes = (words >> (4 * p)) & 0x000F000F
        assert torch.equal(lanes & 0xFFFF, codes[:, 2 * p :: 8].int())
        assert torch.equal(lanes >> 16, codes[:, 2 * p + 1 :: 8].int())


def test_exllama_words_follow_the_order_tuple() -> None:
    weight = random_weight(3, 8, group=8)
    codes, word = unpack_nibbles(weight.codes), layouts.pack(weight, layout=EXLLAMA).codes[:, 0]
    for nibble, index in enumerate(EXLLAMA_ORDER):
        assert torch.equal((word >> (4 * nibble)) & 0xF, codes[:, index].int())


def test_meta_tensors_pack() -> None:
    weight = QuantizedWeight(
        codes=torch.empty(8, 4, dtype=torch.int32, device="meta"), scales=torch.empty(8, 1, device="meta"), group=32
    )
    assert layouts.pack(weight, layout=EXLLAMA).codes.shape == (8, 4)


def test_scales_take_the_activation_dtype() -> None:
    packed = pack(random_weight(16, 64, group=32, act=torch.float16), act=torch.float32)
    assert packed.act == torch.float32


def test_packing_does_not_touch_its_input() -> None:
    weight = random_weight(16, 64, group=32)
    before = weight.codes.clone()
    layouts.pack(weight, layout=EXLLAMA).codes.zero_()
    assert torch.equal(weight.codes, before)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(Unsupported, match="SPIRAL"):
        layouts.pack(random_weight(8, 32, group=32), layout="SPIRAL")
