"""Round to nearest with a searched clipping range: exact where it can be, better than no search where it cannot."""

from __future__ import annotations

import pytest
import torch

from w4a16 import BadInput
from w4a16.quantize import quantize


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_on_the_grid_comes_back_exactly(symmetric: bool, act: torch.dtype) -> None:
    # each group spans all sixteen codes at a power-of-two scale, so every product is exact
    levels = torch.arange(16).repeat(2).float() - (8 if symmetric else 3)
    dense = (levels * 0.25).repeat(4).expand(16, 128)
    assert torch.equal(quantize(dense.to(act), group=32, symmetric=symmetric).dequantize(torch.float32), dense)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_beats_the_full_range(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 256)
    weight[:, ::64] *= 3  # outliers

    def error() -> float:
        return float((quantize(weight, group=128, symmetric=symmetric).dequantize() - weight).square().mean())

    searched = error()
    monkeypatch.setattr("w4a16.quantize.CLIP_GRID", (1.0,))
    assert searched < 0.95 * error()


def test_zero_points_help_a_shifted_weight() -> None:
    weight = torch.rand(32, 128) + 0.2
    errors = [(quantize(weight, group=32, symmetric=s).dequantize() - weight).square().mean() for s in (False, True)]
    assert errors[0] < 0.5 * errors[1]


def test_an_all_zero_group_stays_zero_with_a_valid_scale() -> None:
    weight = quantize(torch.zeros(8, 64, dtype=torch.float16), group=32, symmetric=False).check_values()
    assert not weight.dequantize().any()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 20, 64)
    whole = quantize(weight, group=32, symmetric=False)
    monkeypatch.setattr("w4a16.quantize.CHUNK", 64 * 7)
    parts = quantize(weight, group=32, symmetric=False)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("group", [48, 0, -2, 128])
def test_groups_that_do_not_divide_k_are_refused(group: int) -> None:
    with pytest.raises(BadInput, match="group"):
        quantize(torch.randn(8, 64), group=group, symmetric=True)


@pytest.mark.parametrize("weight", [torch.zeros(64), torch.zeros(8, 64, dtype=torch.int32)])
def test_what_is_no_dense_weight_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(BadInput, match="floating point"):
        quantize(weight, group=32, symmetric=True)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BadInput, match="NaN"):
        quantize(torch.full((8, 64), float("nan")), group=32, symmetric=True)
