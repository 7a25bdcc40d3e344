"""Hopper without one: layout SM90 value by value, and how its tiles and the parts of K are chosen."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from helpers import random_weight

from w4a16 import Problem, Unsupported, api
from w4a16.device import known_device
from w4a16.dispatch import choose, layout_for
from w4a16.dispatch_table import TABLE
from w4a16.kernels.sm90_prefill import plan
from w4a16.layouts import SKINNY, SM90, PackedWeight, pack, unpack
from w4a16.layouts.sm90 import TILE_WORDS
from w4a16.tuning.sm90_decode_tiles import decode_spare_kib, decode_split, settled
from w4a16.tuning.sm90_tiles import (
    Sm90DecodeTile,
    Sm90PrefillTile,
    prefill_choices,
    sm90_shared_bytes,
    sm90_us,
)
from w4a16.tuning.sm90_waves import GAIN, LAUNCH_US
from w4a16.tuning.table import rows_of, tile_for
from w4a16.tuning.tiles import why_illegal
from w4a16.weight import unpack_nibbles

H100 = known_device("sm90")
TILE = Sm90PrefillTile(block_m=128, warpgroups=2, block_k=128, stages=8, step_ns=400.0)


def problem(m: int = 16, n: int = 4096, k: int = 4096, group: int = 128, **fields: object) -> Problem:
    return Problem(**{"m": m, "n": n, "k": k, "group": group, "act": "bf16", "has_zeros": False, **fields})


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(64, 64, 64), (72, 96, 32), (200, 384, 128), (8, 48, 48), (264, 4112, 4112)]
)
def test_pack_and_unpack(n: int, k: int, group: int, asym: bool) -> None:
    weight = random_weight(n, k, group=group, asym=asym)
    again = unpack(pack(weight, layout=SM90))
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)
    assert (again.zeros is None) == (weight.zeros is None)
    assert weight.zeros is None or torch.equal(again.zeros, weight.zeros)


@pytest.mark.parametrize("n", [64, 72])
def test_experts_are_packed_as_each_would_be(n: int) -> None:
    weight = random_weight(n, 128, group=64, asym=True, experts=3)
    packed = pack(weight, layout=SM90)
    for index in range(3):
        assert weight.zeros is not None
        one = replace(weight, codes=weight.codes[index], scales=weight.scales[index], zeros=weight.zeros[index])
        assert_same(packed.expert(index), pack(one, layout=SM90))


def test_packing_all_at_once_gives_what_packing_each_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "current_device", lambda _: H100)
    kinds: list[dict[str, Any]] = [
        {"n": 64, "k": 256}, {"n": 192, "k": 256}, {"n": 72, "k": 256}, {"n": 128, "k": 256, "asym": True},
        {"n": 64, "k": 128}, {"n": 64, "k": 256, "asym": True}, {"n": 64, "k": 256, "act": torch.float16},
        {"n": 64, "k": 256, "act_order": True}, {"n": 64, "k": 256, "experts": 2}, {"n": 128, "k": 256},
    ]  # fmt: skip
    weights = [random_weight(**kind, group=64) for kind in kinds]
    for weight, packed in zip(weights, api.pack_all(weights, act=torch.bfloat16), strict=True):
        assert_same(packed, api.pack(weight, act=torch.bfloat16))
        assert packed.codes.untyped_storage().nbytes() == packed.codes.nbytes
    assert api.pack_all([]) == []


def assert_same(one: PackedWeight, other: PackedWeight) -> None:
    for field in fields(PackedWeight):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) and a.is_contiguous() if isinstance(b, torch.Tensor) else a == b, field.name


def test_every_code_lies_where_the_operand_of_a_thread_wants_it() -> None:
    weight = random_weight(136, 192, group=64)
    packed, codes = pack(weight, layout=SM90), unpack_nibbles(weight.codes)
    words = torch.zeros((3, 3 * TILE_WORDS), dtype=torch.int64)
    for tile in range(9):
        for thread in range(128):
            w, r, c = thread // 32, thread % 32 // 4, thread % 4
            for j, a, b, d in torch.cartesian_prod(*(torch.arange(size) for size in (4, 2, 2, 2))).tolist():
                row, column = tile // 3 * 64 + 16 * w + 8 * a + r, tile % 3 * 64 + 16 * j + 8 * b + 2 * c + d
                code = int(codes[row, column]) if row < 136 else 0
                words[tile // 3, tile % 3 * TILE_WORDS + thread * 4 + j] |= code << (4 * (2 * b + a) + 16 * d)
    assert torch.equal(packed.codes, torch.where(words >= 1 << 31, words - (1 << 32), words).int())


def test_scales_of_rows_eight_apart_lie_side_by_side() -> None:
    weight = random_weight(40, 96, group=32, asym=True)
    packed = pack(weight, layout=SM90)
    assert packed.zeros is not None
    assert weight.zeros is not None
    assert packed.scales.shape == packed.zeros.shape == (4, 64)
    for row in range(40):
        place = row // 16 * 16 + row % 8 * 2 + row % 16 // 8
        assert torch.equal(packed.scales[:3, place], weight.scales[row])
        assert torch.equal(packed.zeros[:3, place], weight.zeros[row])
    assert packed.scales.sum() == packed.scales[:3].sum()


def test_experts_pack_one_after_the_other() -> None:
    weights = [random_weight(24, 64, group=32, asym=True) for _ in range(3)]
    stacked = replace(
        weights[0],
        codes=torch.stack([w.codes for w in weights]),
        scales=torch.stack([w.scales for w in weights]),
        zeros=torch.stack([w.zeros for w in weights]),
    )
    packed = pack(stacked, layout=SM90)
    for i, weight in enumerate(weights):
        assert torch.equal(packed.expert(i).codes, pack(weight, layout=SM90).codes)
        assert torch.equal(packed.expert(i).scales, pack(weight, layout=SM90).scales)


@pytest.mark.parametrize(("group", "k"), [(16, 64), (48, 96), (24, 24)])
def test_groups_that_tiles_cannot_hold_are_refused_and_served_by_triton(group: int, k: int) -> None:
    weight = random_weight(16, k, group=group)
    with pytest.raises(Unsupported, match=f"not {group}"):
        pack(weight, layout=SM90)
    if group % 16 == 0:
        assert layout_for(problem(n=16, k=k, group=group), H100) == SKINNY


def test_one_layout_serves_every_row_count_and_experts() -> None:
    served = {m: choose(problem(m=m), H100, SM90).row.stem for m in (1, 16, 17, 65536)}
    assert served == {1: "sm90_decode", 16: "sm90_decode", 17: "sm90_prefill", 65536: "sm90_prefill"}
    assert layout_for(problem(experts=8, top_k=2), H100) == SM90
    assert layout_for(problem(n=4100), H100) == SKINNY
    row = next(row for row in TABLE if row.stem == "sm90_prefill")
    assert row.unsupported(problem(n=4100), H100) == "n must be a multiple of 8, not 4100"


@pytest.mark.parametrize(("n", "k"), [(24576, 4096), (4096, 12288), (1024, 2048), (8, 64), (152064, 8192)])
@pytest.mark.parametrize("m", [1, 5, 16, 17, 33, 100, 129, 512, 4096, 65536])
def test_every_problem_gets_a_legal_tile_whose_k_is_split(n: int, k: int, m: int) -> None:
    for group in (32, 64, 128, k):
        if k % group == 0:
            p = problem(m=m, n=n, k=k, group=group, has_zeros=True)
            choice = choose(p, H100)
            assert why_illegal(choice.row.stem, choice.tile, p, H100) is None
            assert choice.tile.split_k >= 1


def test_k_is_split_where_tiles_are_fewer_than_sms() -> None:
    assert tile_for("sm90_prefill", problem(m=32), H100).split_k > 1
    assert tile_for("sm90_prefill", problem(m=2048, n=24576), H100).split_k == 1
    tile = tile_for("sm90_prefill", problem(m=512, k=12288), H100)
    assert (tile.block_m, tile.split_k) == (256, 2)  # adding takes less than dequantising twice as often
    assert decode_split(Sm90DecodeTile(), problem(m=1, n=4096), H100) == 8
    assert decode_split(Sm90DecodeTile(), problem(m=1, n=24576), H100) == 1
    assert decode_split(Sm90DecodeTile(), problem(m=1, n=151936), H100) == 1  # an output embedding: many waves
    assert decode_split(Sm90DecodeTile(), problem(m=1, n=64, k=64, group=64), H100) == 1
    for n in (19456, 22016, 24576):  # one wave at three programs an SM
        assert tile_for("sm90_decode", problem(m=16, n=n), H100).split_k == 1
    choices = [(tile.split_k, tile.paired) for tile in prefill_choices(TILE, problem(m=128, k=1024), H100)]
    assert choices == [(1, False), (2, False), (2, True)]


@pytest.mark.parametrize(
    ("n", "split", "residents", "spare"),
    [(24576, 1, 3, 40), (28672, 1, 4, 28), (4096, 8, 5, 21), (151936, 1, 32, 0)],  # the last: many waves
)
def test_programs_spread_evenly_over_the_sms(n: int, split: int, residents: int, spare: int) -> None:
    """An SM has no room for more; clusters have room for one more, as all of their programs start at once."""
    tile = settled(Sm90DecodeTile(split_k=split), problem(m=8, n=n), H100)
    assert (tile.split_k, tile.residents) == (split, residents)
    assert settled(tile, problem(m=8, n=n), H100) == tile
    assert decode_spare_kib(tile, 17408) == spare
    assert spare == 0 or (17 + spare + 1) * residents <= 228 < (17 + spare + 1) * (residents + 1)


def test_predicted_time_grows_by_whole_waves() -> None:
    one = sm90_us(replace(TILE, split_k=1), problem(m=128, n=128 * 132), H100)
    assert sm90_us(replace(TILE, split_k=1), problem(m=100, n=128), H100) == one
    assert sm90_us(replace(TILE, split_k=1), problem(m=128, n=128 * 133), H100) == 2 * one


def test_rows_that_leave_the_last_wave_half_empty_get_a_launch_of_their_own() -> None:
    """40 blocks of 128 rows by 4 of 256: 132 of them in the first launch, those 28 by others in the second."""
    p = problem(m=1024, n=5120, k=5120)
    tile = tile_for("sm90_prefill", p, H100)
    assert (tile.block_m, tile.warpgroups, tile.split_k, tile.first_n) == (256, 2, 1, 132 // 4 * 128)
    assert why_illegal("sm90_prefill", tile, p, H100) is None
    alone = tile_for("sm90_prefill", replace(p, n=5120 - tile.first_n), H100)
    assert tile.rest == alone
    both = sm90_us(tile, replace(p, n=tile.first_n), H100) + sm90_us(alone, replace(p, n=5120 - tile.first_n), H100)
    both += LAUNCH_US
    rows = [row.tile for row in rows_of("sm90") if row.stem == "sm90_prefill" and row.covers(p, H100)]
    assert both < GAIN * min(sm90_us(choice, p, H100) for row in rows for choice in prefill_choices(row, p, H100))
    for whole in (problem(m=1024, n=4096), problem(m=128, n=4096), problem(m=4096, n=24576)):
        assert tile_for("sm90_prefill", whole, H100).rest is None
    p = problem(m=700, n=8192, k=8192)  # two blocks of x fill a wave, 188 rows are left
    tile = tile_for("sm90_prefill", p, H100)
    assert (tile.block_m, tile.first_n, tile.first_m) == (256, 0, 512)
    assert tile.rest == tile_for("sm90_prefill", replace(p, m=188), H100)


@pytest.mark.parametrize("split", [1, 3])
def test_two_launches_share_the_rows_of_w(split: int) -> None:
    weight = pack(random_weight(200, 1024, group=128, asym=True), layout=SM90)
    assert weight.zeros is not None
    x, out, bias = torch.empty(40, 1024).bfloat16(), torch.empty(40, 200).bfloat16(), torch.empty(200).bfloat16()
    tile = replace(TILE, split_k=1, first_n=128, rest=replace(TILE, warpgroups=1, split_k=split))
    first, rest, *added = plan(out=out, x=x, weight=weight, bias=bias, tile=tile)
    assert (first.args["N"], rest.args["N"], len(added)) == (128, 72, split > 1)
    for name, parent in (("codes", weight.codes), ("scales", weight.scales), ("zeros", weight.zeros)):
        behind = 2 * parent.stride(0) if name == "codes" else 128
        assert first.args[f"{name}_desc"].base.data_ptr() == parent.data_ptr()
        assert rest.args[f"{name}_desc"].base.data_ptr() == parent.data_ptr() + behind * parent.itemsize
        assert name == "codes" or rest.args[f"{name}_desc"].strides == [256, 1]
    last = added[0] if added else rest
    written = last.args["out_ptr"] if added else last.args["out_desc"].base
    assert written.data_ptr() == out.data_ptr() + 256
    assert last.args["bias_ptr"].data_ptr() == bias.data_ptr() + 256


def test_two_launches_share_the_rows_of_x() -> None:
    weight = pack(random_weight(72, 256, group=128), layout=SM90)
    x, out = torch.empty(40, 256).bfloat16(), torch.empty(40, 72).bfloat16()
    tile = replace(TILE, split_k=1, first_m=32, rest=replace(TILE, split_k=1))
    first, rest = plan(out=out, x=x, weight=weight, bias=None, tile=tile)
    assert (first.args["M"], rest.args["M"]) == (32, 8)
    for name, tensor in (("x_desc", x), ("out_desc", out)):
        assert first.args[name].base.data_ptr() == tensor.data_ptr()
        assert rest.args[name].base.data_ptr() == tensor[32:].data_ptr()
    assert (
        first.args["codes_desc"].base.data_ptr() == rest.args["codes_desc"].base.data_ptr() == weight.codes.data_ptr()
    )


@pytest.mark.parametrize(
    ("tile", "sentence"),
    [
        (Sm90DecodeTile(), "split_k is settled"),
        (Sm90DecodeTile(split_k=3), "split_k must be 1, 2, 4 or 8"),
        (Sm90DecodeTile(split_k=1, warps=2), "warps must be 4"),
        (Sm90DecodeTile(split_k=1, depth=3), "depth must be"),
        (Sm90DecodeTile(split_k=1, parts=8), "parts must be"),
        (Sm90DecodeTile(split_k=1, warps=16, parts=8, depth=16, slabs=3), "bytes of shared memory"),
        (Sm90DecodeTile(split_k=1, slabs=2), "ring must be 2 to slabs"),
        (Sm90DecodeTile(split_k=1, ring=1), "ring must be 2 to slabs"),
        (replace(TILE, split_k=1, block_m=48), "block_m must be"),
        (replace(TILE, split_k=1, warpgroups=4), "warpgroups must be"),
        (replace(TILE, split_k=1, stages=2), "block_k must be"),
        (replace(TILE, split_k=1, stages=12), "bytes of shared memory"),
        (replace(TILE, split_k=1, warpgroups=1, in_turn=True), "in_turn needs"),
        (replace(TILE, split_k=1, stages=7), "block_k must be"),
        (replace(TILE, split_k=4, paired=True), "paired needs two parts of K, not 4"),
        (replace(TILE, split_k=1, rest=replace(TILE, split_k=1)), "first_n or first_m is the first launch's: 0 and 0"),
        (
            replace(TILE, split_k=1, first_m=16, rest=replace(TILE, split_k=1)),
            "first_m must be less than m (16), not 16",
        ),
        (replace(TILE, split_k=1, first_n=96, rest=replace(TILE, split_k=1)), "first_n must be a multiple of 64"),
        (replace(TILE, split_k=1, first_n=4096, rest=replace(TILE, split_k=1)), "less than n (4096), not 4096"),
        (replace(TILE, split_k=1, first_n=64, rest=replace(TILE, split_k=1, stages=7)), "block_k must be"),
        (
            replace(TILE, split_k=2, block_m=8, paired=True),
            "paired needs a block_m of two powers of two at most, 16 or more, not 8 of 2",
        ),
    ],
)
def test_limits_say_what_they_want(tile: Sm90DecodeTile | Sm90PrefillTile, sentence: str) -> None:
    stem = "sm90_decode" if isinstance(tile, Sm90DecodeTile) else "sm90_prefill"
    assert sentence in (why_illegal(stem, tile, problem(), H100) or "")
    assert "sm80" in (why_illegal(stem, tile, problem(), known_device("sm80")) or "")


def test_rows_of_the_table_fit_shared_memory() -> None:
    tiles = [row.tile for row in rows_of("sm90") if row.stem == "sm90_prefill"]
    for tile in tiles:
        assert tile.step_ns > 0
        assert sm90_shared_bytes(replace(tile, split_k=1)) * tile.residents <= H100.shared_bytes


def test_a_group_that_is_all_of_k_has_one_row_of_scales() -> None:
    """Groups of 32 have four in a step of 128 columns, but not where K itself has 32."""
    for k, rows in ((32, 1), (64, 4)):
        weight = pack(random_weight(64, k, group=32, asym=True), layout=SM90)
        x, out = torch.empty((17, k), dtype=torch.bfloat16), torch.empty((17, 64), dtype=torch.bfloat16)
        (launch,) = plan(out=out, x=x, weight=weight, bias=None, tile=replace(TILE, split_k=1))
        assert launch.args["scales_desc"].block_shape == [rows, 64]
        assert launch.args["zeros_desc"].block_shape == [rows, 128]
        assert (launch.constants["GROUP"] == 32) == (rows == 4)


@pytest.mark.parametrize(
    ("block_m", "rows", "box"),
    [
        (16, (16, 0, 0), 8),
        (96, (64, 32, 0), 16),
        (144, (128, 16, 0), 16),
        (160, (128, 32, 0), 32),
        (208, (128, 64, 16), 16),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_blocks_that_are_no_power_of_two_are_more_products(
    block_m: int, rows: tuple[int, ...], box: int, paired: bool
) -> None:
    """Of one operand; x is copied in boxes of the first, and the rest in boxes that divide all of them."""
    weight = pack(random_weight(64, 256, group=128), layout=SM90)
    x, out = torch.empty((500, 256), dtype=torch.bfloat16), torch.empty((500, 64), dtype=torch.bfloat16)
    tile = replace(TILE, split_k=2 if paired else 1, paired=paired, block_m=block_m)
    (launch,) = plan(out=out, x=x, weight=weight, bias=None, tile=tile)
    assert sum(rows) == block_m
    for name, height in zip(("x_desc", "second_x_desc", "third_x_desc"), rows, strict=True):
        assert (launch.args[name] and launch.args[name].block_shape) == ([height, 64] if height else None)
    assert launch.args["box_desc"].block_shape == [box, 64]
    assert all(height % box == 0 for height in rows)
    stored = [height // 2 if paired else height for height in rows]  # each of a pair has half of the columns
    for name, height in zip(("out_desc", "second_out_desc", "third_out_desc"), stored, strict=True):
        assert (launch.args[name] and launch.args[name].block_shape) == ([height, 64] if height else None)


def test_two_programs_of_a_cluster_share_a_block() -> None:
    weight = pack(random_weight(200, 512, group=128), layout=SM90)
    x, out = torch.empty((300, 512), dtype=torch.bfloat16), torch.empty((300, 200), dtype=torch.bfloat16)
    bias = torch.empty(200, dtype=torch.bfloat16)
    (launch,) = plan(out=out, x=x, weight=weight, bias=bias, tile=replace(TILE, split_k=2, paired=True))
    assert (launch.grid, launch.cluster) == ((3 * 2,), 2)
    assert launch.args["bias_ptr"] is bias
    assert launch.args["parts_ptr"].shape == (12, 128, 64)  # each gives the other half of its columns
