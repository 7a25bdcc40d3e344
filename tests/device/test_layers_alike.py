"""Layers of one shape share what was planned for a row count, and multiply by their own weights."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16 import linear, moe, ops, pack, pack_experts
from w4a16.reference import reference_linear, reference_moe

N, K, LAYERS = 4096, 4096, 3


@pytest.mark.parametrize("m", [1, 17, 160, 700])
def test_layers_alike(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_repeats", "_plans"):
        monkeypatch.setattr(ops, name, {})
    weights = [random_weight(N, K, group=128) for _ in range(LAYERS)]
    layers = [pack(weight, device="cuda") for weight in weights]
    for _ in range(2):
        for weight, layer in zip(weights, layers, strict=True):
            x = torch.randn(m, K).bfloat16()
            assert_close(linear(x.cuda(), layer).cpu(), reference_linear(x, weight))
    assert len(ops._repeats) == LAYERS
    assert len(ops._plans) == 1


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_expert_layers_alike(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_plans", {})
    weights = [
        (random_weight(512, 512, group=128, experts=8), random_weight(512, 256, group=128, experts=8))
        for _ in range(LAYERS)
    ]
    layers = [pack_experts(*pair, device="cuda") for pair in weights]
    for _ in range(2):
        for pair, layer in zip(weights, layers, strict=True):
            x, shares = torch.randn(tokens, 512).bfloat16(), torch.rand(tokens, 2)
            ids = torch.rand(tokens, 8).topk(2).indices
            wanted = reference_moe(x, *pair, shares, ids)
            assert_close(moe(x.cuda(), *layer, shares.cuda(), ids.cuda()).cpu(), wanted)
    assert len(ops._plans) == 1
