"""sm90_moe_few on a real Hopper GPU, against the fp32 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import assert_close, random_weight
from streams import from_a_graph, on_4_streams

from w4a16.device import current_device
from w4a16.kernels.sm90_moe_few import few
from w4a16.layouts import SM90, pack
from w4a16.reference import ACTIVATIONS, reference_moe

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or current_device("cuda").arch != "sm90", reason="needs a Hopper GPU"
)
BF16, FP16 = torch.bfloat16, torch.float16


def check(
    tokens: int,
    *,
    top_k: int = 4,
    experts: int = 8,
    sizes: tuple[int, int] = (512, 192),
    group: int = 128,
    act: torch.dtype = BF16,
    asym: bool = False,
    parts: int = 8,
    ids: torch.Tensor | None = None,
    gated: bool = True,
    activation: str = "silu",
    weight_input: bool = False,
) -> None:
    hidden, inter = sizes
    common: dict[str, Any] = {"act": act, "asym": asym, "experts": experts}
    w13 = random_weight((2 if gated else 1) * inter, hidden, group=group or hidden, **common)
    w2 = random_weight(hidden, inter, group=inter if inter % (group or inter) else group or inter, **common)
    x = torch.randn(tokens, hidden + 16, dtype=act)[:, :hidden]
    if ids is None:
        ids = torch.rand(tokens, experts).topk(top_k).indices
        ids[torch.rand(ids.shape) < 0.1] = -1
    share = torch.rand(ids.shape)
    out = torch.full((tokens, hidden), torch.nan, dtype=act, device="cuda")
    torch.full((1 << 16,), torch.nan, device="cuda")  # what a workspace may find
    how: dict[str, Any] = {"activation": activation, "gated": gated, "weight_input": weight_input}
    packed = [pack(w, layout=SM90).to("cuda") for w in (w13, w2)]
    weights = {"w13": packed[0], "w2": packed[1], "topk_weights": share.cuda(), "topk_ids": ids.cuda()}
    for launch in few(out=out, x=x.cuda(), **weights, **how, parts=parts):
        for tensor in launch.args.values():
            if isinstance(tensor, torch.Tensor) and tensor.shape == (ids.numel(), inter) and launch.constants["GATED"]:
                tensor.fill_(torch.nan)
        launch.run()
    wanted = reference_moe(x, w13, w2, share, ids, **how)
    if wanted.any():
        assert_close(out.cpu(), wanted)
    else:
        assert not out.any()


@pytest.mark.parametrize(("act", "asym", "group"), list(itertools.product((BF16, FP16), (False, True), (32, 64, 128))))
def test_kinds(act: torch.dtype, asym: bool, group: int) -> None:
    check(3, act=act, asym=asym, group=group, sizes=(512, 256))


@pytest.mark.parametrize(("act", "asym", "group"), [(BF16, False, 128), (BF16, True, 64), (FP16, True, 32)])
def test_more_programs_than_sms(act: torch.dtype, asym: bool, group: int) -> None:
    check(5, act=act, asym=asym, group=group, sizes=(512, 256))


@pytest.mark.parametrize("parts", [4, 8])
def test_other_sizes(parts: int) -> None:
    """N and K of no whole tile, parts of K that differ, one group for all of K, groups of several parts."""
    check(2, sizes=(208, 192), group=0, parts=parts)
    check(2, sizes=(320, 64), group=64, asym=True, parts=parts)
    check(2, sizes=(144, 192), group=0, gated=False, parts=parts)
    check(2, sizes=(512, 256), group=256, parts=parts)
    check(1, sizes=(2048, 768), group=0, parts=parts)


@pytest.mark.parametrize(("activation", "gated"), list(itertools.product(sorted(ACTIVATIONS), (True, False))))
def test_activations(activation: str, gated: bool) -> None:
    check(2, activation=activation, gated=gated, act=FP16)


@pytest.mark.parametrize(("top_k", "experts"), [(1, 8), (2, 512), (3, 8), (6, 60), (8, 128), (10, 128)])
def test_routings(top_k: int, experts: int) -> None:
    check(5, top_k=top_k, experts=experts, sizes=(128, 64), group=64, parts=8)
    check(1, top_k=top_k, experts=experts, sizes=(128, 64), group=64, parts=4)
    check(4, experts=experts, ids=torch.full((4, top_k), -1), sizes=(128, 64), group=64, parts=8)
    ids = torch.full((3, 1), experts - 1)
    check(3, experts=experts, ids=ids, sizes=(128, 64), group=64, weight_input=True, parts=8)


@pytest.mark.parametrize("parts", [4, 8])
def test_parts_of_k(parts: int) -> None:
    check(1, parts=parts, sizes=(1024, 384), top_k=8)
    check(2, parts=parts, sizes=(1024, 256), top_k=3, group=32, asym=True, experts=4)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_same_bits_on_4_streams_and_from_a_graph(tokens: int) -> None:
    sizes = (1536, 2048), (2048, 768)
    w13, w2 = (pack(random_weight(*size, group=128, experts=8), layout=SM90).to("cuda") for size in sizes)
    x, share = torch.randn(tokens, 2048).bfloat16().cuda(), torch.rand(tokens, 8).cuda()
    ids = torch.rand(tokens, 8).topk(8).indices.cuda()
    weights = {"w13": w13, "w2": w2, "topk_weights": share, "topk_ids": ids}

    def run() -> torch.Tensor:
        out = torch.full_like(x, torch.nan)
        how: dict[str, Any] = {"activation": "silu", "gated": True, "weight_input": False}
        for launch in few(out=out, x=x, **weights, **how, parts=8):
            launch.run()
        return out

    wanted = run()
    assert all(torch.equal(again, wanted) for again in [*on_4_streams(run), from_a_graph(run)])
