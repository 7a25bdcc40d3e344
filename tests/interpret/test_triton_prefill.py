"""triton_prefill in Triton's interpreter, against the fp32 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, random_weight, relative_rms

from w4a16.kernels.triton_prefill import plan, triton_prefill
from w4a16.layouts import SKINNY, PackedWeight, pack, pad_rows
from w4a16.problem import ACT_DTYPES
from w4a16.reference import reference_linear
from w4a16.tuning.tiles import DEQUANTS, PrefillTile
from w4a16.weight import QuantizedWeight

TILE = PrefillTile(block_m=16, block_n=32, block_k=32, warps=4, unroll_k=2)
FORMS = [(form, act) for form, acts in DEQUANTS.items() for act in acts]


def served(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None, tile: PrefillTile = TILE
) -> torch.Tensor:
    out = x.new_empty((x.shape[0], packed.n))
    assert out.isnan().all()
    triton_prefill(out=out, x=x, weight=packed, bias=bias, tile=tile)
    return out


def agree(weight: QuantizedWeight, m: int, tile: PrefillTile = TILE, act: torch.dtype | None = None) -> None:
    x = torch.randn(m, weight.k).to(act or weight.scales.dtype)
    assert_close(served(x, pack(weight, layout=SKINNY), tile=tile), reference_linear(x, weight))


@pytest.mark.parametrize(("form", "act"), FORMS)
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("weight_first", [False, True])
def test_every_form(form: str, act: str, asym: bool, weight_first: bool) -> None:
    weight = random_weight(40, 128, group=64, asym=asym, act=ACT_DTYPES[act])
    agree(weight, 17, replace(TILE, dequant=form, weight_first=weight_first))


@pytest.mark.parametrize("form", ["int_subtract", "magic", "group_sum"])
@pytest.mark.parametrize("m", [1, 5, 6, 17])
@pytest.mark.parametrize("act", ["bf16", "fp16"])
def test_rows_off_the_tile(form: str, m: int, act: str) -> None:
    agree(random_weight(33, 64, group=32, asym=True, act=ACT_DTYPES[act]), m, replace(TILE, dequant=form))


@pytest.mark.parametrize("form", ["int_subtract", "magic", "group_sum"])
@pytest.mark.parametrize(("group", "k"), [(16, 64), (32, 96), (64, 192), (128, 256), (96, 192), (256, 256), (176, 176)])
def test_groups(form: str, group: int, k: int) -> None:
    """48 columns and the like leave blocks of 16; a group of all of K is channel-wise."""
    agree(random_weight(24, k, group=group, asym=True), 6, replace(TILE, block_k=64, dequant=form))


@pytest.mark.parametrize("form", ["int_subtract", "magic"])
@pytest.mark.parametrize(("group", "k"), [(32, 32), (32, 96), (64, 256)])
@pytest.mark.parametrize("asym", [False, True])
def test_scales_asked_for_ahead(form: str, group: int, k: int, asym: bool) -> None:
    """One step and no other, a group a step, two steps a group."""
    agree(random_weight(40, k, group=group, asym=asym), 17, replace(TILE, dequant=form, ahead=True))


@pytest.mark.parametrize("n", [1, 8, 31, 32, 70])
def test_columns_off_the_tile(n: int) -> None:
    agree(random_weight(n, 64, group=32, asym=True), 3)


@pytest.mark.parametrize("unroll_k", [1, 2, 4, 8])
@pytest.mark.parametrize("form", ["int_subtract", "group_sum"])
def test_unrolled_k_falls_back_where_it_does_not_divide(unroll_k: int, form: str) -> None:
    weight = random_weight(32, 192, group=64)
    tile = replace(TILE, unroll_k=unroll_k, dequant=form)
    (*_, launch) = plan(
        out=torch.empty(4, 32), x=torch.empty(4, 192), weight=pack(weight, layout=SKINNY), bias=None, tile=tile
    )
    steps = (64 if form == "group_sum" else 192) // 32
    assert steps % launch.constants["UNROLL_K"] == 0
    agree(weight, 4, tile)


@pytest.mark.parametrize("form", ["int_subtract", "group_sum"])
def test_every_tensor_has_a_stride_of_its_own(form: str) -> None:
    weight = random_weight(40, 4096, group=32, asym=True)
    packed = pad_rows(pack(weight, layout=SKINNY))
    zeros = packed.zeros
    assert zeros is not None
    zeros = zeros.new_full((zeros.shape[0], zeros.shape[1] + 8), -1)[:, :-8].copy_(zeros)
    packed = replace(packed, zeros=zeros)
    assert len({packed.codes.stride(0), packed.scales.stride(0), zeros.stride(0), weight.k}) == 4
    x = torch.full((5, 4096 + 24), torch.nan, dtype=torch.bfloat16)[:, :4096].copy_(torch.randn(5, 4096))
    out = torch.full((5, 48), torch.nan, dtype=torch.bfloat16)
    tile = replace(TILE, dequant=form)
    triton_prefill(out=out[:, :40], x=x, weight=packed, bias=None, tile=tile)
    assert_close(out[:, :40], reference_linear(x, weight))
    assert out[:, 40:].isnan().all()


@pytest.mark.parametrize("act", ["bf16", "fp16"])
@pytest.mark.parametrize("weight_first", [False, True])
def test_bias(act: str, weight_first: bool) -> None:
    weight = random_weight(40, 64, group=64, act=ACT_DTYPES[act])
    x, bias = torch.randn(17, 64).to(ACT_DTYPES[act]), torch.randn(40).to(ACT_DTYPES[act])
    got = served(x, pack(weight, layout=SKINNY), bias, replace(TILE, weight_first=weight_first))
    assert_close(got, reference_linear(x, weight, bias))


def test_programs_cover_every_block_once() -> None:
    """Nine blocks of M, so that the second band of the walk is one block tall."""
    weight = random_weight(96, 32, group=32)
    agree(weight, 9 * 16 - 3, replace(TILE, unroll_k=1))


@pytest.mark.parametrize("act", ["bf16", "fp16"])
def test_forms_that_promise_the_same_bits_keep_them(act: str) -> None:
    weight = random_weight(40, 128, group=64, asym=True, act=ACT_DTYPES[act])
    x, packed = torch.randn(17, 128).to(ACT_DTYPES[act]), pack(weight, layout=SKINNY)
    results = [served(x, packed, tile=replace(TILE, dequant=f)) for f in ("float_subtract", "int_subtract", "magic")]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(results))


@pytest.mark.parametrize(("form", "act"), [("int_truncate", "bf16"), ("carrier", "fp16")])
def test_forms_that_round_otherwise_err_more(form: str, act: str) -> None:
    weight = random_weight(64, 256, group=64, asym=True, act=ACT_DTYPES[act])
    x, packed = torch.randn(16, 256).to(ACT_DTYPES[act]), pack(weight, layout=SKINNY)
    wanted = reference_linear(x, weight)
    rounded, other = (relative_rms(served(x, packed, tile=replace(TILE, dequant=f)), wanted) for f in ("magic", form))
    assert rounded < other


@pytest.mark.parametrize("act", ["bf16", "fp16"])
def test_group_sum_survives_activations_far_from_zero(act: str) -> None:
    """The offset it subtracts again grows with the sum of x."""
    weight = random_weight(32, 256, group=128, asym=True, act=ACT_DTYPES[act])
    x = (torch.randn(8, 256) + 3).to(ACT_DTYPES[act])
    got = served(x, pack(weight, layout=SKINNY), tile=replace(TILE, dequant="group_sum"))
    assert_close(got, reference_linear(x, weight))
