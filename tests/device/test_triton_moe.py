"""triton_moe on a real GPU, against the fp32 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16.kernels.triton_moe import triton_moe
from w4a16.layouts import SKINNY, PackedWeight, pack
from w4a16.reference import reference_moe
from w4a16.tuning.tiles import MoeTile
from w4a16.weight import QuantizedWeight

TILE = MoeTile(block_m=64, block_n=64, block_k=64, group_m=4, warps=4, stages=2)
HOW: dict[str, Any] = {"activation": "silu", "gated": True, "weight_input": False}
HIDDEN, INTER, EXPERTS = 512, 272, 8


def weights(act: torch.dtype, asym: bool, act_order: bool = False) -> tuple[QuantizedWeight, QuantizedWeight]:
    common: dict[str, Any] = {"act": act, "asym": asym, "experts": EXPERTS, "act_order": act_order}
    w13 = random_weight(2 * INTER, HIDDEN, group=128, **common)
    return w13, random_weight(HIDDEN, INTER, group=16, **common)


def run(x: torch.Tensor, w13: PackedWeight, w2: PackedWeight, share: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    triton_moe(out=out, x=x, w13=w13, w2=w2, topk_weights=share, topk_ids=ids, linear=None, tile=TILE, **HOW)
    return out


@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 8), (2, 2), (5, 1), (17, 2), (40, 8), (300, 2)])
def test_triton_moe(act: torch.dtype, asym: bool, tokens: int, top_k: int) -> None:
    w13, w2 = weights(act, asym, act_order=tokens == 17)
    x, share = torch.randn(tokens, HIDDEN, dtype=act), torch.rand(tokens, top_k)
    ids = torch.rand(tokens, EXPERTS).topk(top_k).indices
    ids[0, 0] = -1 if tokens > 1 else ids[0, 0]
    args = (x.cuda(), *(pack(w, layout=SKINNY).to("cuda") for w in (w13, w2)), share.cuda(), ids.cuda())
    got = run(*args)
    assert torch.equal(got, run(*args))
    assert_close(got.cpu(), reference_moe(x, w13, w2, share, ids, **HOW))


@pytest.mark.parametrize("tokens", [1, 40])
def test_in_a_cuda_graph(tokens: int) -> None:
    w13, w2 = weights(torch.bfloat16, True)
    a, b = (pack(w, layout=SKINNY).to("cuda") for w in (w13, w2))
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    share, ids = torch.rand(tokens, 2, device="cuda"), torch.rand(tokens, EXPERTS, device="cuda").topk(2).indices
    run(x, a, b, share, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, a, b, share, ids)
    x.copy_(torch.randn_like(x))
    ids.copy_(torch.rand(tokens, EXPERTS, device="cuda").topk(2).indices)
    graph.replay()
    assert_close(out.cpu(), reference_moe(x.cpu(), w13, w2, share.cpu(), ids.cpu(), **HOW))
