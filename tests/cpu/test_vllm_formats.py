"""What the vLLM plugin does to each tensor before vLLM cuts it: the readers' plain form, shards on group boundaries."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_weight

from w4a16.checkpoints import FORMATS, Scheme
from w4a16.errors import BadCheckpoint, Unsupported
from w4a16.plugins import _vllm_formats as formats
from w4a16.plugins import vllm as plugin
from w4a16.weight import QuantizedWeight, concat_rows, stack_experts

N, K, GROUP = 24, 128, 32
CPU = torch.device("cpu")


def stored(name: str, weight: QuantizedWeight, scheme: Scheme) -> tuple[formats.Stored, dict[str, torch.Tensor]]:
    kinds = {
        "compressed-tensors": formats.compressed_tensors(symmetric=scheme.symmetric),
        "awq": formats.awq(stores_zeros=True),
        "gptq": formats.gptq(version=1 if scheme.symmetric else 2, act_order=scheme.act_order, reads_order=True),
    }
    return kinds[name], FORMATS[name].write(weight, scheme)


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_plain_form_of_each_tensor(name: str, asym: bool) -> None:
    weight, scheme = random_weight(N, K, group=GROUP, asym=asym), Scheme(GROUP, not asym)
    kind, tensors = stored(name, weight, scheme)
    codes, scales = (convert(tensors[key]) for key, convert in (kind.codes, kind.scales))
    zeros = None if kind.zeros is None else kind.zeros[1](tensors[kind.zeros[0]])
    assert torch.equal(codes, weight.codes)
    assert torch.equal(scales, weight.scales)
    got = formats.weight_of(codes, scales, zeros, None, scheme=scheme, group=GROUP)
    assert torch.equal(got.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert got.has_zeros == asym
    assert set(kind.names) >= tensors.keys() - {"g_idx"}


def test_compressed_tensors_pads_its_zero_points() -> None:
    weight = random_weight(20, K, group=GROUP, asym=True)
    kind, tensors = stored("compressed-tensors", weight, Scheme(GROUP, False))
    assert kind.zeros is not None
    assert torch.equal(kind.zeros[1](tensors["weight_zero_point"])[:20], weight.zeros)


@pytest.mark.parametrize("asym", [False, True])
def test_act_order(asym: bool) -> None:
    weight, scheme = random_weight(N, K, group=GROUP, asym=asym, act_order=True), Scheme(GROUP, not asym, True)
    kind, tensors = stored("gptq", weight, scheme)
    assert kind.order == "g_idx"
    plain = [convert(tensors[key]) for key, convert in (kind.codes, kind.scales, kind.zeros or kind.codes)]
    got = formats.weight_of(*plain, tensors["g_idx"], scheme=scheme, group=GROUP)
    assert torch.equal(got.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_trivial_order_is_none() -> None:
    order = formats.in_order(formats.Cut(n=N, k=K, whole_k=K), Scheme(GROUP, True), 2, 3)
    assert order.shape == (2, 3, K)
    assert formats.order_of(order[1, 2], GROUP) is None


def test_unequal_groups() -> None:
    g_idx = torch.arange(K) // GROUP
    g_idx[0] = 1
    with pytest.raises(BadCheckpoint, match="g_idx"):
        formats.order_of(g_idx, GROUP)


def g_idx_of(weight: QuantizedWeight) -> torch.Tensor:
    assert weight.perm is not None
    g_idx = torch.empty(weight.k, dtype=torch.int32)
    g_idx[weight.perm] = (torch.arange(weight.k) // weight.group).int()
    return g_idx


def test_experts_in_act_order() -> None:
    """Each expert has its own order, gate and up of one expert the same."""
    scheme, experts, orders = Scheme(GROUP, True, True), [], []
    for _ in range(3):
        gate = random_weight(N, K, group=GROUP, act_order=True)
        experts.append(concat_rows([gate, replace(random_weight(N, K, group=GROUP), perm=gate.perm)]))
        orders.append(torch.stack([g_idx_of(gate)] * 2))
    wanted = stack_experts(experts)
    in_file = [FORMATS["gptq"].write(one, scheme)["qweight"].t().contiguous() for one in experts]
    got = formats.experts_of(torch.stack(in_file), wanted.scales, None, torch.stack(orders), scheme=scheme, group=GROUP)
    assert torch.equal(got.dequantize(torch.float32), wanted.dequantize(torch.float32))
    orders[1][1] = orders[1][1].flip(0)
    with pytest.raises(Unsupported, match="gate and up projections"):
        formats.experts_of(torch.stack(in_file), wanted.scales, None, torch.stack(orders), scheme=scheme, group=GROUP)


@pytest.mark.parametrize(
    ("k", "whole", "scheme", "sentence"),
    [
        (128, 256, Scheme(128, True), None),
        (128, 256, Scheme(-1, True), None),
        (128, 256, Scheme(256, False), None),  # one group as wide as the input: cut inside it
        (96, 192, Scheme(64, True), "does not end on a boundary of 64"),
        (100, 200, Scheme(-1, True), "boundary of 8"),
        (128, 192, Scheme(128, True), "not a multiple of the group 128"),
        (128, 256, Scheme(32, True, True), "does not split along K=256"),
        (256, 256, Scheme(32, True, True), None),
    ],
)
def test_refusal(k: int, whole: int, scheme: Scheme, sentence: str | None) -> None:
    cut = formats.Cut(n=64, k=k, whole_k=whole)
    got = formats.refusal(cut, scheme, torch.bfloat16, CPU)
    assert got is None if sentence is None else sentence in (got or "")


def test_refusal_of_a_dtype() -> None:
    cut = formats.Cut(n=64, k=64, whole_k=64)
    assert "float64" in (formats.refusal(cut, Scheme(32, True), torch.float64, CPU) or "")


def test_a_shard_of_a_wide_group_shares_its_scales() -> None:
    whole, half = formats.Cut(n=8, k=256, whole_k=256), formats.Cut(n=8, k=128, whole_k=256)
    for scheme in (Scheme(-1, True), Scheme(256, True)):
        assert not whole.shares_scales(scheme)
        assert half.shares_scales(scheme)
        assert (half.group(scheme), half.groups(scheme)) == (128, 1)
    assert (half.group(Scheme(32, True)), half.groups(Scheme(32, True))) == (32, 4)
    assert not half.shares_scales(Scheme(32, True))


def test_off_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w4a16.env.VLLM", False)
    plugin.register()
    assert not plugin._registered


def test_an_unknown_vllm_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """An exception in the entry point would end vLLM: what is missing is named in its log, and nothing changes."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    code = "import logging; logging.basicConfig(); from w4a16.plugins.vllm import register; register(); register()"
    env: dict[str, Any] = {"PYTHONPATH": f"{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.count("w4a16 is off: this vLLM has no vllm.logger.init_logger") == 1
