"""triton_decode in Triton's interpreter, against the fp32 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16.kernels.triton_decode import triton_decode
from w4a16.layouts import SKINNY, pack, pad_rows
from w4a16.reference import reference_linear
from w4a16.tuning.tiles import DecodeTile
from w4a16.weight import QuantizedWeight

MATRIX = DecodeTile(block_n=32, block_k=64, split_k=2)
ON_SUM = replace(MATRIX, dequant="group_sum")
AHEAD = replace(MATRIX, stages=3)  # scales are asked for a step before their use
BF16, FP16 = torch.bfloat16, torch.float16


def served(
    weight: QuantizedWeight, x: torch.Tensor, tile: DecodeTile, bias: torch.Tensor | None = None, pad: bool = False
):  # type: ignore[no-untyped-def]
    packed = pack(weight, layout=SKINNY)
    out = x.new_empty((x.shape[0], weight.n))
    assert out.isnan().all()
    triton_decode(out=out, x=x, weight=pad_rows(packed) if pad else packed, bias=bias, tile=tile)
    return out


@pytest.mark.parametrize(("tile", "m"), [(tile, m) for tile in (MATRIX, ON_SUM, AHEAD) for m in (1, 5, 6, 16)])
@pytest.mark.parametrize("act", [BF16, FP16])
@pytest.mark.parametrize("asym", [False, True])
def test_rows_dtypes_and_zero_points(tile: DecodeTile, m: int, act: torch.dtype, asym: bool) -> None:
    weight, x = random_weight(40, 192, group=64, asym=asym, act=act), torch.randn(m, 192, dtype=act)
    assert_close(served(weight, x, tile), reference_linear(x, weight))


@pytest.mark.parametrize("tile", [MATRIX, ON_SUM, AHEAD])
@pytest.mark.parametrize(("group", "k"), [(16, 48), (32, 96), (64, 320), (128, 384), (96, 192), (144, 144), (256, 256)])
def test_groups_and_k_off_the_tile(tile: DecodeTile, group: int, k: int) -> None:
    weight, x = random_weight(24, k, group=group, asym=True), torch.randn(2, k).to(BF16)
    assert_close(served(weight, x, tile), reference_linear(x, weight))


@pytest.mark.parametrize("tile", [MATRIX, ON_SUM])
@pytest.mark.parametrize("n", [1, 8, 33])
@pytest.mark.parametrize("split_k", [1, 4])
def test_columns_splits_bias_strides_and_padding(tile: DecodeTile, n: int, split_k: int) -> None:
    weight, bias = random_weight(n, 256, group=32, asym=True), torch.randn(n).to(BF16)
    x = torch.randn(3, 300).to(BF16)[:, 20:276]
    got = served(weight, x, replace(tile, split_k=split_k), bias, pad=True)
    assert_close(got, reference_linear(x, weight, bias))


@pytest.mark.parametrize("tile", [MATRIX, ON_SUM, AHEAD])
def test_more_splits_than_steps(tile: DecodeTile) -> None:
    weight, x = random_weight(16, 128, group=64), torch.randn(1, 128).to(BF16)
    assert_close(served(weight, x, replace(tile, split_k=8)), reference_linear(x, weight))


@pytest.mark.parametrize("tile", [MATRIX, ON_SUM])
@pytest.mark.parametrize("act", [BF16, FP16])
def test_a_large_mean_of_x_does_not_cancel_badly(tile: DecodeTile, act: torch.dtype) -> None:
    weight, x = random_weight(32, 512, group=128, asym=True, act=act), (torch.randn(2, 512) * 0.1 + 4).to(act)
    assert_close(served(weight, x, tile), reference_linear(x, weight))


@pytest.mark.parametrize("tile", [MATRIX, ON_SUM])
def test_the_same_bits_every_time(tile: DecodeTile) -> None:
    weight, x = random_weight(32, 256, group=64, asym=True), torch.randn(4, 256).to(BF16)
    assert torch.equal(served(weight, x, tile), served(weight, x, tile))
