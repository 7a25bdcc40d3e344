"""triton_moe in Triton's interpreter, against the fp32 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16 import Unsupported
from w4a16.kernels.triton_moe import triton_moe
from w4a16.layouts import SKINNY, pack, pad_rows
from w4a16.reference import ACTIVATIONS, reference_moe
from w4a16.tuning.tiles import DEQUANTS, MoeTile

TILE = MoeTile(block_m=32, block_n=64, block_k=32)
EXPERTS = 4
FP16, BF16 = torch.float16, torch.bfloat16


def check(
    tokens: int,
    *,
    top_k: int = 2,
    act: torch.dtype = BF16,
    experts: int = EXPERTS,
    hidden: int = 64,
    inter: int = 32,
    groups: tuple[int, int] = (32, 32),
    asym: bool = True,
    act_order: bool = False,
    padded: bool = False,
    gated: bool = True,
    activation: str = "silu",
    weight_input: bool = False,
    ids: torch.Tensor | None = None,
    tile: MoeTile = TILE,
) -> torch.Tensor:
    common: dict[str, Any] = {"asym": asym, "act": act, "experts": experts, "act_order": act_order}
    w13 = random_weight((2 if gated else 1) * inter, hidden, group=groups[0], **common)
    w2 = random_weight(hidden, inter, group=groups[1], **common)
    x = torch.randn(tokens, 2 * hidden, dtype=act)[:, :hidden]
    if ids is None:
        ids = torch.rand(tokens, experts).topk(top_k).indices
    weights = torch.rand(ids.shape)
    packed = [pack(w, layout=SKINNY) for w in (w13, w2)]
    packed = [pad_rows(w) for w in packed] if padded else packed
    how: dict[str, Any] = {"activation": activation, "gated": gated, "weight_input": weight_input}
    out = torch.empty(tokens, hidden, dtype=act)
    call = {"x": x, "w13": packed[0], "w2": packed[1], "topk_weights": weights, "topk_ids": ids, "linear": None}
    triton_moe(out=out, **call, **how, tile=tile)
    wanted = reference_moe(x, w13, w2, weights, ids, **how)
    if wanted.any():
        assert_close(out, wanted)
    return out


@pytest.mark.parametrize("act", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 8), (2, 2), (5, 1), (6, 8), (17, 2), (40, 2)])
def test_tokens(act: torch.dtype, tokens: int, top_k: int) -> None:
    check(tokens, top_k=top_k, act=act, experts=8, asym=tokens != 17)


@pytest.mark.parametrize("act", [BF16, FP16])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("groups", [(32, 64), (64, 32), (128, 64)])
def test_groups(act: torch.dtype, asym: bool, groups: tuple[int, int]) -> None:
    check(6, act=act, asym=asym, groups=groups, hidden=128, inter=64, padded=True)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation: str, gated: bool) -> None:
    check(6, activation=activation, gated=gated, act=FP16)


@pytest.mark.parametrize("tokens", [1, 17])
def test_sizes_off_the_tile_and_channel_wise(tokens: int) -> None:
    check(tokens, hidden=144, inter=80, groups=(144, 80), tile=MoeTile(block_m=16, block_n=64, block_k=32, group_m=2))


@pytest.mark.parametrize("tokens", [1, 17])
def test_act_order(tokens: int) -> None:
    check(tokens, act_order=True)


@pytest.mark.parametrize("tokens", [1, 17])
def test_weights_on_the_input(tokens: int) -> None:
    check(tokens, top_k=1, weight_input=True)


@pytest.mark.parametrize("dequant", [form for form in DEQUANTS if "fp16" in DEQUANTS[form] and form != "group_sum"])
def test_dequant_forms(dequant: str) -> None:
    check(6, act=FP16, tile=MoeTile(block_m=16, block_n=32, block_k=32, dequant=dequant))


@pytest.mark.parametrize("tokens", [2, 17])
def test_skipped_experts_add_nothing(tokens: int) -> None:
    ids = torch.rand(tokens, EXPERTS).topk(2).indices
    ids[0] = -1
    ids[1, 0] = EXPERTS
    assert not check(tokens, ids=ids)[0].any()
    assert not check(tokens, ids=torch.full_like(ids, -1).int()).any()


def test_one_expert_takes_all() -> None:
    check(40, ids=torch.full((40, 1), 2))


def test_sums_of_x_are_refused() -> None:
    with pytest.raises(Unsupported, match="group_sum"):
        check(1, tile=MoeTile(block_m=16, block_n=32, block_k=32, dequant="group_sum"))


def test_a_group_too_short_for_the_matrix_units_is_refused() -> None:
    with pytest.raises(Unsupported, match="group of w2 is 8"):
        check(1, inter=40, groups=(32, 8))
