"""sm90_moe_decode on a real Hopper GPU, against the fp32 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import assert_close, random_weight
from streams import from_a_graph, on_4_streams

from w4a16.device import current_device
from w4a16.kernels._launch import Launch
from w4a16.kernels._token_sums import placed_sums
from w4a16.kernels.route import route_launches
from w4a16.kernels.sm90_moe_decode import few, gemm
from w4a16.layouts import SM90, PackedWeight, pack
from w4a16.reference import ACTIVATIONS, reference_moe
from w4a16.tuning.sm90_tiles import Sm90DecodeTile

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or current_device("cuda").arch != "sm90", reason="needs a Hopper GPU"
)
BF16, FP16 = torch.bfloat16, torch.float16
TILE = Sm90DecodeTile(warps=4, depth=4, split_k=1, slabs=8)


def layer(
    out: torch.Tensor,
    x: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    share: torch.Tensor,
    ids: torch.Tensor,
    block: int,
    tile: Sm90DecodeTile,
    *,
    activation: str = "silu",
    gated: bool = True,
    weight_input: bool = False,
) -> tuple[Launch, ...]:
    """The launches of a whole expert layer by this kernel alone."""
    how: dict[str, Any] = {"activation": activation, "gated": gated}
    if block == 1:
        weights = {"w13": w13, "w2": w2, "topk_weights": share, "topk_ids": ids, "weight_input": weight_input}
        return few(out=out, x=x, **weights, **how, tile=tile, tile2=tile)
    routing, route = route_launches(ids, w13.experts, block, pdl=True)
    hidden = x.new_full((routing.sorted_token_ids.numel(), w2.k), torch.nan)
    y = x.new_full((routing.sorted_token_ids.numel(), w2.n), torch.nan)
    first, last = (share, None) if weight_input else (None, share)
    common: dict[str, Any] = {"routing": routing, "tile": tile}
    gemm1 = gemm(out=hidden, x=x, weight=w13, shares=first, top_k=ids.shape[1], **how, **common)
    gemm2 = gemm(out=y, x=hidden, weight=w2, shares=last, top_k=None, activation=None, gated=False, **common)
    return *route, gemm1, gemm2, placed_sums(out, y, routing.position)


def check(
    tokens: int,
    *,
    block: int,
    top_k: int = 4,
    experts: int = 8,
    sizes: tuple[int, int] = (256, 128),
    group: int = 128,
    act: torch.dtype = BF16,
    asym: bool = False,
    tile: Sm90DecodeTile = TILE,
    ids: torch.Tensor | None = None,
    gated: bool = True,
    **how: Any,
) -> None:
    hidden, inter = sizes
    common: dict[str, Any] = {"act": act, "asym": asym, "experts": experts}
    w13 = random_weight((2 if gated else 1) * inter, hidden, group=group or hidden, **common)
    w2 = random_weight(hidden, inter, group=group or inter, **common)
    x = torch.randn(tokens, hidden + 16, dtype=act)[:, :hidden]
    if ids is None:
        ids = torch.rand(tokens, experts).topk(top_k).indices
        ids[torch.rand(ids.shape) < 0.1] = -1
    share = torch.rand(ids.shape)
    out = torch.full((tokens, hidden), torch.nan, dtype=act, device="cuda")
    packed = [pack(w, layout=SM90).to("cuda") for w in (w13, w2)]
    for launch in layer(out, x.cuda(), *packed, share.cuda(), ids.cuda(), block, tile, gated=gated, **how):
        launch.run()
    wanted = reference_moe(x, w13, w2, share, ids, gated=gated, **how)
    if wanted.any():
        assert_close(out.cpu(), wanted)
    else:
        assert not out.any()


@pytest.mark.parametrize(("act", "asym", "group"), list(itertools.product((BF16, FP16), (False, True), (32, 64, 128))))
def test_kinds(act: torch.dtype, asym: bool, group: int) -> None:
    for block, tokens in ((1, 3), (8, 9), (16, 20)):
        check(tokens, block=block, act=act, asym=asym, group=group)


@pytest.mark.parametrize("block", [1, 8, 16])
def test_other_sizes(block: int) -> None:
    """Tiles of rows that do not pair up, K of no whole tile, one group for all of K."""
    check(5, block=block, sizes=(208, 192), group=0)
    check(5, block=block, sizes=(320, 64), group=64, asym=True)
    check(5, block=block, sizes=(144, 192), group=0, gated=False)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(("activation", "gated"), list(itertools.product(sorted(ACTIVATIONS), (True, False))))
def test_activations(block: int, activation: str, gated: bool) -> None:
    check(6, block=block, activation=activation, gated=gated, act=FP16)


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize(("top_k", "experts"), [(1, 8), (2, 512), (6, 60), (8, 256), (10, 128)])
def test_routings(block: int, top_k: int, experts: int) -> None:
    check(7, block=block, top_k=top_k, experts=experts, sizes=(128, 64), group=64)
    check(1, block=block, top_k=top_k, experts=experts, sizes=(128, 64), group=64)
    ids = torch.full((40, 1), experts - 1)
    check(40, block=block, experts=experts, ids=ids, sizes=(128, 64), group=64)
    check(40, block=block, experts=experts, ids=ids, sizes=(128, 64), group=64, weight_input=True)
    check(4, block=block, experts=experts, ids=torch.full((4, top_k), -1), sizes=(128, 64), group=64)


TILES = [
    Sm90DecodeTile(warps=4, depth=16, split_k=1, slabs=2, ring=2, residents=32),
    Sm90DecodeTile(warps=4, depth=8, split_k=1, slabs=8),
    Sm90DecodeTile(warps=4, depth=4, split_k=1, slabs=2, ring=2, residents=32),
    Sm90DecodeTile(warps=4, depth=4, split_k=2, slabs=8),
    Sm90DecodeTile(warps=4, depth=4, split_k=4, slabs=3),
    Sm90DecodeTile(warps=4, depth=2, split_k=8, slabs=3),
    Sm90DecodeTile(warps=8, depth=4, split_k=1, slabs=3),
]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles(tile: Sm90DecodeTile) -> None:
    check(9, block=8, tile=tile, sizes=(2048, 768), experts=4, top_k=3)
    check(9, block=1 if tile.split_k > 1 else 16, tile=tile, sizes=(1024, 256), experts=4, top_k=3, group=32, asym=True)


@pytest.mark.parametrize("block", [1, 8])
def test_the_same_bits_on_4_streams_and_from_a_graph(block: int) -> None:
    sizes = (512, 512), (512, 256)
    w13, w2 = (pack(random_weight(*size, group=64, experts=8), layout=SM90).to("cuda") for size in sizes)
    x, share = torch.randn(6, 512).bfloat16().cuda(), torch.rand(6, 4).cuda()
    ids = torch.rand(6, 8).topk(4).indices.cuda()

    def run() -> torch.Tensor:
        out = torch.full_like(x, torch.nan)
        for launch in layer(out, x, w13, w2, share, ids, block, TILE):
            launch.run()
        return out

    wanted = run()
    assert all(torch.equal(again, wanted) for again in [*on_4_streams(run), from_a_graph(run)])
