"""sm90_moe without a Hopper GPU: what it compiles to, what it launches, and when it is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_weight

from w4a16 import BadInput, Problem, env, pack_experts
from w4a16.api import experts_layout
from w4a16.codegen.compile import compile_launch
from w4a16.codegen.stems import launches
from w4a16.device import known_device
from w4a16.dispatch import choose, layout_for
from w4a16.dispatch_table import TABLE
from w4a16.kernels.sm90_moe import plan, registers
from w4a16.layouts import SKINNY, SM90, pack
from w4a16.moe.route import most_blocks
from w4a16.nn import W4A16Experts
from w4a16.tuning.sm90_moe_tiles import WIDE, Sm90MoeTile, sm90_moe_shared_bytes
from w4a16.tuning.sm90_tiles import Sm90DecodeTile
from w4a16.tuning.tiles import why_illegal

H100 = known_device("sm90")
WIDEST = Sm90MoeTile(block_m=128, stages=6)
DECODE = Sm90DecodeTile(split_k=1)


def problem(m: int = 1024, n: int = 1536, k: int = 2048, group: int = 128, **fields: Any) -> Problem:
    return Problem(**{"m": m, "n": n, "k": k, "group": group, "experts": 128, "top_k": 8, **fields})


@pytest.mark.parametrize(
    ("asked", "which"),
    [
        (problem(has_zeros=True), min),
        (problem(group=64), min),
        (problem(group=32, act="fp16"), min),
        (problem(), max),
        (problem(group=32, has_zeros=True), max),
    ],
    ids=str,
)
def test_nothing_spills_and_no_wgmma_is_serialised(asked: Problem, which: Any) -> None:
    """Of the tiles of wgmma that serve, those with least and most memory; test_isa_golden.py compiles every row."""
    serving = [choose(replace(asked, m=tokens), H100).tile for tokens in (128, 256, 512, 1024, 4096)]
    tile = which(
        (tile for tile in serving if tile.block_m in WIDE), key=lambda tile: sm90_moe_shared_bytes(tile, asked)
    )
    gemms = [launch for launch in launches("sm90_moe", asked, H100, tile) if launch.fn.__name__ == "_sm90_moe"]
    assert len(gemms) == 2
    for launch in gemms:
        compiled = compile_launch(launch, H100)
        assert compiled.spills == 0
        assert not compiled.serialised_wgmma
        assert compiled.shared_bytes <= sm90_moe_shared_bytes(tile, asked) <= H100.shared_bytes


@pytest.mark.parametrize(("gathers", "has_zeros"), [(True, True), (False, True), (False, False)])
def test_registers_are_all_that_an_sm_has(gathers: bool, has_zeros: bool) -> None:
    """Programs that share an SM start with fewer, and those are what their warpgroups then divide."""
    tiles = [Sm90MoeTile(block_m=block) for block in (32, 64, 128)]
    tiles += [Sm90MoeTile(block_m=32, residents=2), *(Sm90MoeTile(block_m=block, warpgroups=4) for block in (32, 96))]
    for tile in tiles:
        consumer, producer, start = registers(tile, gathers, has_zeros)
        threads = 128 * (tile.warpgroups + 1)
        assert consumer <= 232
        assert bool(start) == (tile.residents > 1)
        start = start or 65536 // threads // 8 * 8  # as Triton chooses where it is told none
        assert threads * start * tile.residents <= 65536
        assert consumer * tile.warpgroups + producer == start * (tile.warpgroups + 1)


def planned(act_order: bool = False, gated: bool = True, tile: Sm90MoeTile = WIDEST, tokens: int = 40) -> list[Any]:
    experts, hidden, inter, top_k = 8, 256, 128, 2
    w13 = random_weight(2 * inter if gated else inter, hidden, group=64, experts=experts, act_order=act_order)
    w2 = random_weight(hidden, inter, group=64, experts=experts, act_order=act_order)
    x = torch.randn(tokens, hidden).bfloat16()
    return list(
        plan(
            out=torch.empty_like(x),
            x=x,
            w13=pack(w13, layout=SM90),
            w2=pack(w2, layout=SM90),
            topk_weights=torch.rand(tokens, top_k),
            topk_ids=torch.rand(tokens, experts).topk(top_k).indices,
            activation="silu",
            gated=gated,
            weight_input=False,
            tile=tile,
        )
    )


def test_what_an_expert_layer_launches() -> None:
    route, gemm1, gemm2, sums = planned()
    positions = most_blocks(80, 8, 128) * 128
    assert [launch.fn.__name__ for launch in (route, sums)] == ["_route", "_placed_sums"]
    hidden, y = gemm1.args["out_ptr"], gemm2.args["out_ptr"]
    assert (hidden.shape, hidden.stride()) == ((positions, 128), (256, 1))  # with room for a whole unit
    assert (y.shape, y.stride()) == ((positions, 256), (256, 1))
    assert gemm1.args["x_desc"] is None
    assert gemm2.args["x_ptr"] is None
    assert gemm1.args["slots"] == 80
    assert route.args["order_ptr"] is gemm1.args["order_ptr"] is gemm2.args["order_ptr"]
    assert route.args["taken_ptr"] is gemm1.args["taken_ptr"] is gemm2.args["taken_ptr"]
    assert (gemm1.args["which"], gemm2.args["which"]) == (0, 1)
    assert gemm1.constants["GATED"]
    assert not gemm2.constants["GATED"]
    assert gemm1.grid == (positions // 128 * 1,)  # two pairs of tiles, one unit of work for two warpgroups
    for launch in (route, gemm1, gemm2, sums):
        assert [*launch.args, *launch.constants] == launch.fn.arg_names
        assert launch.options["launch_pdl"]


def test_rows_in_act_order_are_gathered_by_launches_of_their_own() -> None:
    names = [launch.fn.__name__ for launch in planned(act_order=True)]
    assert names == ["_route", "_permuted_rows", "_sm90_moe", "_permuted_rows", "_sm90_moe", "_placed_sums"]
    few = Sm90MoeTile(block_m=1, gemm1=DECODE, gemm2=DECODE)
    assert [launch.fn.__name__ for launch in planned(act_order=True, tile=few, tokens=2)][:2] == names[:2]


def test_blocks_of_up_to_16_slots_take_mma_sync() -> None:
    for block, count in ((1, 2), (8, 4), (16, 4)):
        names = [launch.fn.__name__ for launch in planned(tile=Sm90MoeTile(block_m=block, gemm1=DECODE, gemm2=DECODE))]
        assert names.count("_sm90_moe_decode") == 2
        assert len(names) == count


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 64, 256, 1024, 4096, 65536])
@pytest.mark.parametrize(
    ("n", "k", "experts", "top_k"), [(1536, 2048, 128, 8), (1024, 2048, 256, 8), (2816, 2048, 60, 4)]
)
def test_every_load_gets_a_legal_tile(tokens: int, n: int, k: int, experts: int, top_k: int) -> None:
    for group in (32, 64, 128, k):
        asked = problem(m=tokens, n=n, k=k, group=group, experts=experts, top_k=top_k, has_zeros=True)
        choice = choose(asked, H100)
        assert (choice.row.stem, choice.layout) == ("sm90_moe", SM90)
        assert why_illegal("sm90_moe", choice.tile, asked, H100) is None


def test_blocks_grow_with_the_load_of_an_expert() -> None:
    blocks = [choose(problem(m=tokens), H100).tile.block_m for tokens in (1, 16, 64, 256, 1024, 4096)]
    assert blocks == sorted(blocks)
    assert blocks[-1] == 128


@pytest.mark.parametrize(
    ("tile", "sentence"),
    [
        (replace(WIDEST, block_m=48), "block_m must be one of 1, 8, 16, 32, 64, 96, 128, not 48"),
        (replace(WIDEST, stages=5), "stages must be at least 6, not 5"),
        (replace(WIDEST, stages=10), "bytes of shared memory"),
        (Sm90MoeTile(block_m=32, stages=12, residents=2), "bytes of shared memory"),
        (replace(WIDEST, residents=2), "residents must be 1, or 2 for blocks of 32, not 2 for blocks of 128"),
        (replace(WIDEST, warpgroups=4), "warpgroups must be 2, or 4 for blocks of up to 96, not 4 for blocks of 128"),
        (Sm90MoeTile(block_m=96), "warpgroups must be 2, or 4 for blocks of up to 96, not 2 for blocks of 96"),
        (Sm90MoeTile(block_m=96, stages=10, warpgroups=4), "bytes of shared memory"),
        (replace(WIDEST, block_m=8), "blocks of 8 slots need gemm1 and gemm2"),
        (Sm90MoeTile(block_m=8, gemm1=DECODE, gemm2=replace(DECODE, warps=3)), "warps must be 4, 8 or 16, not 3"),
    ],
)
def test_limits_say_what_they_want(tile: Sm90MoeTile, sentence: str) -> None:
    assert sentence in (why_illegal("sm90_moe", tile, problem(), H100) or "")
    assert "this is sm80" in (why_illegal("sm90_moe", tile, problem(), known_device("sm80")) or "")


@pytest.mark.parametrize("k", [1984, 2000, 2880])  # 31, 32 and 45 tiles
def test_a_group_that_is_all_of_k_has_a_tile_at_every_load(k: int) -> None:
    for tokens in (1, 16, 64, 128, 256, 700, 1000, 1024, 4096):
        asked = problem(m=tokens, k=k, group=k)
        assert why_illegal("sm90_moe", choose(asked, H100).tile, asked, H100) is None


def test_a_ring_holds_three_stages_where_k_rounds_to_two_tiles_each() -> None:
    small = replace(WIDEST, block_m=32, stages=5)
    assert why_illegal("sm90_moe", small, problem(k=2000, group=2000), H100) == "stages must be at least 6, not 5"
    assert why_illegal("sm90_moe", small, problem(k=1984, group=1984), H100) is None


def test_two_programs_an_sm_want_groups_of_128() -> None:
    two = Sm90MoeTile(block_m=32, stages=7, residents=2)
    assert why_illegal("sm90_moe", two, problem(), H100) is None
    assert "not 2 in groups of 64" in (why_illegal("sm90_moe", two, problem(group=64), H100) or "")


def test_stages_of_small_groups_hold_one_tile_each() -> None:
    small, asked = replace(WIDEST, stages=3), problem(group=64)
    assert why_illegal("sm90_moe", small, asked, H100) == "stages must be at least 4, not 3"
    assert why_illegal("sm90_moe", replace(small, stages=4), asked, H100) is None


def test_what_its_tiles_cannot_hold_stays_with_triton_moe() -> None:
    asked = problem(n=2 * 96)
    assert layout_for(asked, H100) == SKINNY
    assert choose(asked, H100).row.stem == "triton_moe"
    row = next(row for row in TABLE if row.stem == "sm90_moe")
    assert "n must be a multiple of 128 (gate and up in tiles of 64)" in (row.unsupported(asked, H100) or "")
    assert layout_for(problem(group=16), H100) == SKINNY


def test_a_forced_kernel_decides_the_layout_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "FORCED_KERNEL", "triton_moe")
    assert layout_for(problem(), H100) == SKINNY


def test_both_weights_of_a_layer_get_one_layout() -> None:
    """96 columns of w2 fit tiles, 192 rows of w13 do not, as gate and up would share one."""
    assert experts_layout(problem(m=1), problem(m=1, n=2048, k=768), H100) == SM90
    w13, w2 = problem(m=1, n=192), problem(m=1, n=2048, k=96, group=32)
    assert (layout_for(w13, H100), layout_for(w2, H100)) == (SKINNY, SM90)
    assert experts_layout(w13, w2, H100) == SKINNY
    packed = pack_experts(random_weight(64, 32, group=32, experts=2), random_weight(32, 32, group=32, experts=2))
    assert packed[0].layout == packed[1].layout


def test_experts_of_two_layouts_are_refused() -> None:
    w13, w2 = (random_weight(128, 64, group=64, experts=2) for _ in range(2))
    with pytest.raises(BadInput, match="Pack both by pack_experts"):
        W4A16Experts(2).set(pack(w13, layout=SM90), pack(w2, layout=SKINNY))
