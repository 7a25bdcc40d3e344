"""Layouts: unpack(pack(q)) == q, and each is what its definition says."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight

from w4a16 import Unsupported, layouts, pack, unpack
from w4a16.layouts import EXLLAMA, EXLLAMA_ORDER, INT4PACK, SKINNY, SM90, pad_rows
from w4a16.layouts.exllama import codes_stride_bytes, scales_stride_bytes
from w4a16.layouts.sm90 import split_sm90
from w4a16.weight import QuantizedWeight, concat_rows, unpack_nibbles


def assert_same(got: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert got.group == wanted.group
    for name in ("codes", "scales", "zeros", "perm"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("layout", [EXLLAMA, SKINNY, INT4PACK])
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


def test_skinny_zeros_are_nibbles_along_n() -> None:
    weight = random_weight(20, 64, group=32, asym=True)
    zeros = layouts.pack(weight, layout=SKINNY).zeros
    assert zeros is not None
    assert zeros.shape == (3, 2)
    for n in range(20):
        assert torch.equal((zeros[n // 8] >> (4 * (n % 8))) & 15, weight.zeros[n].int())  # type: ignore[index]


@pytest.mark.parametrize("experts", [0, 3])
def test_padded_rows_hold_the_same_weight(experts: int) -> None:
    weight = random_weight(16, 8192, group=32, asym=True, experts=experts)
    padded = pad_rows(layouts.pack(weight, layout=SKINNY))
    assert padded.zeros is not None
    assert [t.stride(-2) * t.element_size() for t in (padded.codes, padded.scales, padded.zeros)] == [4352, 640, 1152]
    assert_same(unpack(padded), weight)


@pytest.mark.parametrize("asym", [False, True])
def test_weights_packed_as_one_and_split_have_the_bits_of_packing_each(asym: bool) -> None:
    weights = [random_weight(n, 256, group=64, asym=asym) for n in (64, 192, 128)]
    joined = layouts.pack(concat_rows(weights), layout=SM90)
    for weight, part in zip(weights, split_sm90(joined, [64, 192, 128]), strict=True):
        alone = layouts.pack(weight, layout=SM90)
        assert (part.n, part.zeros is None) == (weight.n, not asym)
        for name in ("codes", "scales", "zeros")[: 2 + asym]:
            got, wanted = getattr(part, name), getattr(alone, name)
            assert torch.equal(got, wanted)
            assert got.untyped_storage().nbytes() == got.nbytes


def test_gfx11_strides_stay_off_the_cliff() -> None:
    for row in range(16, 8192, 16):
        codes, scales = codes_stride_bytes(row), scales_stride_bytes(row)
        assert codes >= row, row
        assert codes % 128 == 0, row
        assert codes % 512, row
        assert scales >= row, row
        assert scales % 512, row
