"""sm90_moe_decode without a Hopper GPU: every kind of launch compiles for it and spills nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from w4a16.codegen.compile import compile_launch
from w4a16.device import known_device
from w4a16.kernels._launch import Launch
from w4a16.kernels._token_sums import placed_sums
from w4a16.kernels.route import route_launches
from w4a16.kernels.sm90_moe_decode import few, gemm
from w4a16.layouts import SM90, PackedWeight
from w4a16.tuning.sm90_tiles import Sm90DecodeTile

H100 = known_device("sm90")
EXPERTS, HIDDEN, INTER = 128, 2048, 768
BF16, FP16 = torch.bfloat16, torch.float16
TILE = Sm90DecodeTile(warps=4, depth=4, split_k=1, slabs=8)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(n: int, k: int, group: int, act: torch.dtype, asym: bool) -> PackedWeight:
    grid = (EXPERTS, k // group, n)
    return PackedWeight(
        layout=SM90,
        codes=meta(EXPERTS, n // 64, k // 64 * 512, dtype=torch.int32),
        scales=meta(*grid, dtype=act),
        zeros=meta(*grid, dtype=torch.uint8) if asym else None,
        perm=None,
        n=n,
        k=k,
        group=group,
    )


def launches(tokens: int, top_k: int, block: int, group: int, act: torch.dtype, asym: bool) -> tuple[Launch, ...]:
    w13, w2 = packed(2 * INTER, HIDDEN, group, act, asym), packed(HIDDEN, INTER, group, act, asym)
    x, ids = meta(tokens, HIDDEN, dtype=act), meta(tokens, top_k, dtype=torch.int64)
    out, shares = torch.empty_like(x), meta(tokens, top_k, dtype=torch.float32)
    how: dict[str, Any] = {"activation": "silu", "gated": True}
    if block == 1:
        layer = {"w13": w13, "w2": w2, "topk_weights": shares, "topk_ids": ids, "weight_input": False}
        return few(out=out, x=x, **layer, **how, tile=TILE, tile2=TILE)
    routing, route = route_launches(ids, EXPERTS, block, pdl=True)
    positions = routing.sorted_token_ids.numel()
    hidden, y = meta(positions, INTER, dtype=act), meta(positions, HIDDEN, dtype=act)
    common: dict[str, Any] = {"routing": routing, "tile": TILE}
    gemm1 = gemm(out=hidden, x=x, weight=w13, shares=None, top_k=top_k, **how, **common)
    gemm2 = gemm(out=y, x=hidden, weight=w2, shares=shares, top_k=None, activation=None, gated=False, **common)
    return *route, gemm1, gemm2, placed_sums(out, y, routing.position)


@pytest.mark.parametrize(
    ("tokens", "top_k", "block", "group", "act", "asym"),
    [
        (1, 8, 1, 128, BF16, False),
        (3, 10, 1, 32, FP16, True),
        (16, 8, 8, 128, BF16, True),
        (128, 8, 16, 64, FP16, False),
        (8192, 8, 16, 128, BF16, True),
    ],
)
def test_nothing_spills(tokens: int, top_k: int, block: int, group: int, act: torch.dtype, asym: bool) -> None:
    for launch in launches(tokens, top_k, block, group, act, asym):
        compiled = compile_launch(launch, H100)
        assert compiled.spills == 0, (compiled.name, compiled.registers)


def test_a_token_with_few_choices_is_summed_by_its_cluster() -> None:
    gemm1, gemm2 = launches(2, 8, 1, 128, BF16, False)
    assert gemm1.grid == (16 * INTER // 32,)
    assert (gemm2.cluster, gemm2.grid) == (8, (2 * HIDDEN // 64,))
    assert len(launches(2, 10, 1, 128, BF16, False)) == 3


@pytest.mark.parametrize(
    ("slots", "programs"), [(8, [(32,)]), (2048, [(32,)]), (2056, [(3,), (32, 3)]), (1 << 19, [(32,), (32, 32)])]
)
def test_many_slots_are_counted_first(slots: int, programs: list[tuple[int, ...]]) -> None:
    _, route = route_launches(meta(slots // 8, 8, dtype=torch.int32), EXPERTS, 16)
    assert [tuple(size for size in launch.grid if size != 1) for launch in route] == programs
