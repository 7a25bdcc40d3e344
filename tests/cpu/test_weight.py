"""QuantizedWeight: nibbles, dequantise, shards, joins, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import random_weight

from w4a16 import BadInput, QuantizedWeight, Unsupported
from w4a16.weight import concat_rows, pack_nibbles, stack_experts, unpack_nibbles


def slow_dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """One element at a time, from the definition."""
    codes = unpack_nibbles(weight.codes)
    out = torch.zeros(weight.n, weight.k, dtype=torch.float64)
    for n in range(weight.n):
        for j in range(weight.k):
            g = j // weight.group
            zero = 8 if weight.zeros is None else int(weight.zeros[n, g])
            column = j if weight.perm is None else int(weight.perm[j])
            out[n, column] = (int(codes[n, j]) - zero) * float(weight.scales[n, g])
    return out.to(weight.scales.dtype)


@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (2, 5, 16)])
def test_nibbles_round_trip(shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 16, shape)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)).long(), codes)


def test_nibble_zero_is_the_lowest_bits() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]])).item() == 0xF7654321 - (1 << 32)


@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_dequantize_is_the_definition(act: torch.dtype, asym: bool, act_order: bool) -> None:
    weight = random_weight(5, 64, group=32, asym=asym, act=act, act_order=act_order)
    assert torch.equal(weight.dequantize(), slow_dequantize(weight))


def test_dequantize_of_experts_is_that_of_each() -> None:
    experts = [random_weight(4, 32, group=16, asym=True, act_order=True) for _ in range(3)]
    wanted = torch.stack([expert.dequantize() for expert in experts])
    assert torch.equal(stack_experts(experts).dequantize(), wanted)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_join_to_the_whole(group: int, dim: int) -> None:
    weight = random_weight(16, 256, group=group, asym=True)
    world = 2
    shards = [weight.shard(dim, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([s.dequantize() for s in shards], dim=dim), weight.dequantize())


def test_fused_rows_shard_part_by_part() -> None:
    gate, up = random_weight(8, 32, group=32), random_weight(8, 32, group=32)
    shard = concat_rows([gate, up]).shard(0, 1, 2, parts=2)
    assert torch.equal(shard.dequantize(), torch.cat([gate.dequantize()[4:], up.dequantize()[4:]]))


def test_experts_shard_inside_each() -> None:
    weight = random_weight(8, 64, group=32, asym=True, experts=3)
    shards = [weight.shard(1, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([s.dequantize() for s in shards], dim=-1), weight.dequantize())


def test_channel_wise_shards_inside_its_group() -> None:
    weight = random_weight(4, 64, group=64, asym=True)
    shards = [weight.shard(1, rank, 4) for rank in range(4)]
    assert [s.group for s in shards] == [16] * 4
    assert torch.equal(torch.cat([s.dequantize() for s in shards], dim=1), weight.dequantize())


@pytest.mark.parametrize(
    ("dim", "world", "act_order", "sentence"),
    [(0, 3, False, "N=16"), (1, 3, False, "K=96"), (1, 2, False, "boundaries of 32"), (1, 3, True, "act-order")],
)
def test_uneven_shards_are_refused(dim: int, world: int, act_order: bool, sentence: str) -> None:
    weight = random_weight(16, 96 if world == 2 else 64 if dim else 96, group=32, act_order=act_order)
    if sentence == "K=96":
        weight, world = random_weight(16, 96, group=32), 4
    with pytest.raises(Unsupported, match=sentence):
        weight.shard(dim, 0, world)


def test_shard_arguments_are_checked() -> None:
    with pytest.raises(BadInput, match="rank"):
        random_weight(8, 32, group=32).shard(0, 2, 2)


def test_join_refuses_unequal_act_order() -> None:
    with pytest.raises(Unsupported, match="act-order"):
        concat_rows([random_weight(8, 32, group=32, act_order=True) for _ in range(2)])


def test_join_refuses_unequal_kinds() -> None:
    with pytest.raises(BadInput, match="unequal"):
        stack_experts([random_weight(8, 32, group=32), random_weight(8, 32, group=32, asym=True)])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"codes": torch.zeros(4, 4, dtype=torch.int64)}, "codes dtype"),
        ({"codes": torch.zeros(4, dtype=torch.int32)}, "codes"),
        ({"group": 24}, "group"),
        ({"group": 0}, "group"),
        ({"scales": torch.ones(4, 1, dtype=torch.float64)}, "scales dtype"),
        ({"scales": torch.ones(4, 2)}, "scales shape"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.int32)}, "zeros dtype"),
        ({"zeros": torch.zeros(4, 2, dtype=torch.uint8)}, "zeros shape"),
        ({"perm": torch.zeros(32, dtype=torch.int32)}, "perm dtype"),
        ({"perm": torch.zeros(31, dtype=torch.int64)}, "perm shape"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(BadInput, match=field):
        replace(random_weight(4, 32, group=32), **change)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"scales": torch.full((4, 1), float("nan"))}, "scales"),
        ({"scales": torch.full((4, 1), float("inf"))}, "scales"),
        ({"scales": torch.zeros(4, 1)}, "scales"),
        ({"zeros": torch.full((4, 1), 16, dtype=torch.uint8)}, "zeros"),
        ({"perm": torch.zeros(32, dtype=torch.int64)}, "perm"),
    ],
)
def test_poisonous_values_are_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(BadInput, match=field):
        replace(random_weight(4, 32, group=32), **change).check_values()
