"""Every device that w4a16 has tuning rows for is served, also where vLLM itself has no kernel or takes a detour."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_refusal import Config, Layer
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import auto_awq, get_quantization_config

from w4a16.checkpoints import Scheme
from w4a16.checkpoints.base import CHANNEL
from w4a16.device import DEVICES
from w4a16.plugins import _vllm_formats, _vllm_moe
from w4a16.plugins._vllm_linear import W4A16LinearMethod
from w4a16.plugins.vllm import register

SCHEMES = [Scheme(group, symmetric) for group in (32, 64, 128, CHANNEL) for symmetric in (True, False)]
SCHEMES += [Scheme(32, symmetric, act_order=True) for symmetric in (True, False)]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
HIDDEN, INTERMEDIATE, EXPERTS = 2048, 768, 128


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("arch", DEVICES)
def test_linear_layers_and_experts(arch: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of gfx1151 and of CPUs without AMX, asymmetric ones, act-order: vLLM has none of these."""
    for module in (_vllm_formats, _vllm_moe):
        monkeypatch.setattr(module, "current_device", lambda _: DEVICES[arch])
    sizes = {"hidden_dim": HIDDEN, "intermediate_size_per_partition": INTERMEDIATE, "num_local_experts": EXPERTS}
    config = type("C", (Config,), {**sizes, "experts_per_token": 8, "tp_size": 1, "tp_rank": 0})
    linear = _vllm_formats.Cut(n=INTERMEDIATE, k=HIDDEN, whole_k=HIDDEN)
    assert _vllm_formats.refusal(linear, scheme, torch.bfloat16, torch.device("cpu")) is None
    assert _vllm_moe.moe_refusal(type("L", (Layer,), {"moe_config": config}), scheme) is None


@pytest.mark.parametrize("name", ["awq", "auto_awq", "awq_marlin"])
def test_awq_on_rocm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own method there dequantises the weight in every call."""
    register()
    # vLLM's own class for it does not import without a ROCm driver
    others = dict.fromkeys(("is_cpu", "is_xpu", "is_cuda"), lambda: False)
    monkeypatch.setattr(auto_awq, "current_platform", SimpleNamespace(is_rocm=lambda: True, **others))
    config: Any = get_quantization_config(name).from_config(AWQ)
    layer = LinearBase.__new__(LinearBase)
    method = config.get_quant_method(layer, "model.layers.0.mlp.down_proj")
    assert isinstance(method, W4A16LinearMethod)
    assert isinstance(method.stock(), auto_awq.AutoAWQLinearMethod)
