"""How weights are handed to other libraries' kernels, by a stand-in that computes what the library documents."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from w4a16.bench.expert_cases import ExpertShape, random_experts
from w4a16.bench.expert_providers import PROVIDERS as EXPERT_PROVIDERS
from w4a16.bench.providers import PROVIDERS
from w4a16.device import known_device
from w4a16.problem import Problem
from w4a16.quantize import quantize
from w4a16.reference import reference_linear, reference_moe
from w4a16.weight import unpack_nibbles


class HummingLayer:
    """Codes int32 [.., N, K/8], scales [.., N, K/G] or [.., N, 1], zero points int32 [.., N/8, K/G], nibble n % 8."""

    def __init__(
        self, *, shape_n: int, shape_k: int, weight_config: dict[str, Any], num_experts: int | None, torch_dtype: Any
    ) -> None:
        assert weight_config["dtype"] == "uint4"
        self.k, self.n, self.num_experts, self.config = shape_k, shape_n, num_experts, weight_config
        self.humming_config: dict[str, Any] | None = None

    def to(self, device: torch.device) -> HummingLayer:
        return self

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        assert ("zero_point" in tensors) == self.config["has_zero_point"]
        scales = tensors["weight_scale"].float()
        groups = self.k // (self.config["group_size"] or self.k)
        lead = () if self.num_experts is None else (self.num_experts,)
        assert scales.shape == (*lead, self.n, groups)
        zeros = torch.full_like(scales, 8)
        if "zero_point" in tensors:
            assert tensors["zero_point"].shape == (*lead, self.n // 8, groups)
            zeros = unpack_nibbles(tensors["zero_point"].transpose(-1, -2)).transpose(-1, -2).float()
        levels = unpack_nibbles(tensors["weight"]).float().unflatten(-1, (groups, -1))
        self.dense = ((levels - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(-2)

    def transform(self) -> None:
        self.humming_config = {"rows": self.n}

    def __call__(self, x: Tensor, *, top_k: int = 1, **given: Any) -> Tensor:
        assert self.humming_config is not None
        if self.num_experts is None:
            return (x.float() @ self.dense.T).to(x.dtype)
        assert given["compute_config"] == {"gemm_type": "indexed"}
        out = x.new_full((len(x) * top_k, self.n), torch.nan)
        used = int(given["num_tokens_padded"])
        for slots, expert in zip(given["sorted_ids"][:used].view(-1, 48), given["expert_ids"].tolist(), strict=False):
            mine = slots[slots < len(out)].long()
            out[mine] = (x[mine // top_k].float() @ self.dense[expert].T).to(x.dtype)
        return out


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package, layer, tune = (ModuleType(name) for name in ("humming", "humming.layer", "humming.tune"))
    layer.HummingLayer = HummingLayer  # type: ignore[attr-defined]
    tune.get_heuristics_config = lambda *_, **__: {"block_shape": (48, 128, 64)}  # type: ignore[attr-defined]
    for module in (package, layer, tune):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("group", [32, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_linear_layer_of_humming(symmetric: bool, group: int) -> None:
    weight = quantize(torch.randn(24, 256).bfloat16(), group=group, symmetric=symmetric)
    x = torch.randn(5, 256).bfloat16()
    first, second = PROVIDERS["humming"].prepare(weight, x.dtype, 2)
    wanted = reference_linear(x, weight)
    for multiply in (first, second):
        assert_close(multiply(x), wanted)


@pytest.mark.parametrize("has_zeros", [True, False])
def test_an_expert_layer_of_humming(has_zeros: bool) -> None:
    shape = ExpertShape(name="small", experts=8, top_k=2, hidden=128, inter=64, group=64)
    weights = random_experts(shape, act="fp16", has_zeros=has_zeros, device=torch.device("cpu"))
    x, shares, ids = torch.randn(40, 128).half(), torch.rand(40, 2), torch.rand(40, 8).topk(2).indices
    layer = EXPERT_PROVIDERS["humming"].prepare(weights, x.dtype)
    got = layer.layer(x, shares, ids).float()
    wanted = reference_moe(x, *weights, shares, ids)
    assert float((got - wanted).norm() / wanted.norm()) < 3e-3  # three roundings of 1e-3, as the bench allows
    assert layer.gemms is not None
    both, y = layer.gemms(x, shares, ids)()  # type: ignore[misc]
    assert both.shape == (80, 128)
    assert not y.isnan().any()


def test_a_library_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w4a16.bench.peers.installed", lambda module: False)
    problem = Problem(m=1, n=64, k=64, group=64)
    assert PROVIDERS["humming"].unsupported(problem, known_device("sm90")) == "humming is not installed"
