"""What w4a16 refuses stays on vLLM's own method, with one line in its log that says why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from w4a16.checkpoints import Scheme
from w4a16.errors import Unsupported
from w4a16.plugins import _vllm_linear as linear
from w4a16.plugins._vllm_formats import compressed_tensors
from w4a16.plugins._vllm_moe import moe_refusal


class Stock:
    """Stands for a method of vLLM's."""

    def __init__(self) -> None:
        self.created: list[Any] = []

    def create_weights(self, layer: nn.Module, *sizes: Any, **extra: Any) -> None:
        self.created.append((sizes, extra))


def create(method: linear.W4A16LinearMethod, dtype: torch.dtype, k: int = 64) -> nn.Module:
    layer = nn.Module()
    layer.quant_method = method
    method.create_weights(layer, k, [8, 8], 64, 16, dtype, weight_loader=None)
    return layer


def test_stays_on_vllm_with_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_said", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    stored, scheme = compressed_tensors(symmetric=True), Scheme(32, True)
    for prefix in ("layers.0.mlp", "layers.1.mlp"):
        stock = Stock()
        method = linear.W4A16LinearMethod(stored, scheme, prefix, lambda stock=stock: stock)
        layer = create(method, torch.float64)
        assert layer.quant_method is stock
        assert stock.created == [((64, [8, 8], 64, 16, torch.float64), {"weight_loader": None})]
        assert not dict(layer.named_parameters())
    said = [record.getMessage() for record in caplog.records if "stays on vLLM" in record.getMessage()]
    assert said == [
        "layers.0.mlp stays on vLLM's own kernel: activations are torch.float64, not bfloat16, float16 or float32."
    ]


def test_where_vllm_has_nothing_it_is_an_error() -> None:
    method = linear.W4A16LinearMethod(compressed_tensors(symmetric=True), Scheme(32, True), "layers.0.mlp", None)
    with pytest.raises(Unsupported, match=r"layers\.0\.mlp: its shard of 16 of K=64 .* vLLM has no kernel"):
        create(method, torch.bfloat16, k=16)


class Config:
    """The fields of FusedMoEConfig that w4a16 reads."""

    hidden_dim, intermediate_size_per_partition, tp_size, tp_rank = 64, 32, 2, 0
    num_local_experts, experts_per_token = 4, 2
    is_act_and_mul, has_bias, is_lora_enabled, tp_shard_with_padding = True, False, False, False

    class moe_parallel_config:  # noqa: N801, vLLM's name
        use_all2all_kernels = use_ag_rs_all2all_kernels = False

    class activation:  # noqa: N801, vLLM's name
        value = "silu"


class Deepep:
    """Ranks that exchange tokens by kernels of their own."""

    use_all2all_kernels, use_ag_rs_all2all_kernels, all2all_backend = True, False, "deepep_low_latency"


class Layer:
    moe_config, params_dtype = Config, torch.bfloat16
    swiglu_limit = swiglu_alpha = swiglu_beta = None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"has_bias": True}, "biases"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"tp_shard_with_padding": True}, "padded"),
        ({"intermediate_size_per_partition": 24, "tp_size": 4}, "does not end on a boundary of 32"),
        ({"moe_parallel_config": Deepep}, "travel by deepep"),
        ({"activation": type("A", (), {"value": "swigluoai"})}, "compute swigluoai"),
    ],
)
def test_experts(changes: dict[str, Any], sentence: str | None) -> None:
    layer = type("L", (Layer,), {"moe_config": type("C", (Config,), changes)})
    got = moe_refusal(layer, Scheme(32, True))
    assert got is None if sentence is None else sentence in (got or "")


def test_experts_that_clamp() -> None:
    assert "clamp" in (moe_refusal(type("L", (Layer,), {"swiglu_limit": 7.0}), Scheme(32, True)) or "")
