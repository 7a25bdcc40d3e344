"""The modules hold one packed weight, say what they are, and follow the model about."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, random_weight
from torch import nn

from w4a16 import BadInput, pack, unpack
from w4a16.nn import W4A16Experts, W4A16Linear
from w4a16.reference import reference_linear, reference_moe


def test_linear_is_the_reference() -> None:
    weight, bias = random_weight(24, 64, group=32, asym=True), torch.randn(24).bfloat16()
    layer = W4A16Linear.of(pack(weight), bias)
    x = torch.randn(2, 5, 64).bfloat16()
    assert_close(layer(x), reference_linear(x, weight, bias))
    assert (layer.in_features, layer.out_features) == (64, 24)
    assert "group=32, asym" in repr(layer)
    assert torch.equal(unpack(layer.get()).codes, weight.codes)


def test_experts_are_the_reference() -> None:
    w13 = random_weight(64, 64, group=32, asym=True, experts=4)
    w2 = random_weight(64, 32, group=32, asym=True, experts=4)
    layer = W4A16Experts(4)
    layer.set(pack(w13), pack(w2))
    x, ids, weights = torch.randn(3, 64).bfloat16(), torch.tensor([[0, 1], [3, 2], [1, 4]]), torch.rand(3, 2)
    assert_close(layer(x, ids, weights), reference_moe(x, w13, w2, weights, ids))
    assert "experts=4" in repr(layer)


@pytest.mark.parametrize("layer", [W4A16Linear(64, 24), W4A16Experts(2)])
def test_an_empty_layer_says_so(layer: nn.Module) -> None:
    x = torch.zeros(1, 64)
    with pytest.raises(BadInput, match="no weight yet"):
        layer(x) if isinstance(layer, W4A16Linear) else layer(x, torch.zeros(1, 1).long(), torch.ones(1, 1))


def test_tensors_are_buffers_and_copies_are_whole() -> None:
    layer = W4A16Linear.of(pack(random_weight(24, 64, group=32, asym=True)))
    assert set(layer.state_dict()) == {"codes", "scales", "zeros"}
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_cast_module_computes_in_the_new_dtype() -> None:
    weight = random_weight(24, 64, group=16, act=torch.float16)  # group 16: a layout that every dtype reads
    layer = W4A16Linear.of(pack(weight)).to(torch.float32)
    x = torch.randn(3, 64)
    assert_close(layer(x), reference_linear(x, weight))
