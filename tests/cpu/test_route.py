"""moe/route.py against the same thing in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w4a16.moe.route import choose_block, moe_align_block_size, route


def check(ids: list[list[int]], experts: int, block: int) -> None:
    tensor = torch.tensor(ids)
    got, slots = moe_align_block_size(tensor, experts, block), tensor.numel()
    sorted_ids: list[int] = []
    owners: list[int] = []
    for expert in range(experts):
        mine = [slot for slot, owner in enumerate(tensor.flatten().tolist()) if owner == expert]
        blocks = -(-len(mine) // block)
        sorted_ids += mine + [slots] * (blocks * block - len(mine))
        owners += [expert] * blocks
    spare = got.expert_ids.numel() - len(owners)
    assert spare >= 0
    assert got.expert_ids.tolist() == owners + [-1] * spare
    assert got.sorted_token_ids.tolist() == sorted_ids + [slots] * (spare * block)
    assert got.num_tokens_post_padded.tolist() == [len(sorted_ids)]
    stands = {slot: at for at, slot in enumerate(sorted_ids) if slot < slots}
    assert got.position.tolist() == [stands.get(slot, -1) for slot in range(slots)]
    bound = slots + experts * (block - 1)
    assert got.sorted_token_ids.numel() <= -(-bound // block) * block
    outputs = (got.sorted_token_ids, got.expert_ids, got.num_tokens_post_padded, got.position)
    assert {t.dtype for t in outputs} == {torch.int32}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_routing(data: st.DataObject) -> None:
    experts, top_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    row = st.lists(st.integers(-2, experts + 1), min_size=top_k, max_size=top_k)
    check(data.draw(st.lists(row, min_size=1, max_size=30)), experts, data.draw(st.sampled_from([2, 4, 16, 32])))


@pytest.mark.parametrize("ids", [[[0]], [[-1, -1]] * 3, [[3, 7]] * 50, [[7, 7]], [[0, 1]] + [[5, 1]] * 33])
def test_corners(ids: list[list[int]]) -> None:
    check(ids, 8, 16)


def test_blocks_of_one_are_not_sorted() -> None:
    got = route(torch.tensor([[3, -1], [0, 4]]), 4, 1)
    assert got.sorted_token_ids.tolist() == [0, 1, 2, 3]
    assert got.expert_ids.tolist() == [3, -1, 0, -1]
    assert got.num_tokens_post_padded.tolist() == [4]
    assert got.position.tolist() == [0, -1, 2, -1]


def test_shapes_follow_from_sizes_alone() -> None:
    got = route(torch.empty((40, 8), dtype=torch.int64, device="meta"), 128, 16)
    assert got.sorted_token_ids.shape == (16 * got.expert_ids.numel(),)
    assert got.expert_ids.numel() == (40 * 8 + 128 * 15 + 15) // 16


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "largest", "block"),
    [(1, 8, 128, 64, 1), (5, 8, 128, 64, 1), (5, 8, 8, 64, 16), (6, 8, 128, 64, 16), (512, 8, 128, 64, 32),
     (4096, 8, 128, 64, 64), (4096, 8, 128, 128, 128)],
)  # fmt: skip
def test_choose_block(tokens: int, top_k: int, experts: int, largest: int, block: int) -> None:
    assert choose_block(tokens, top_k, experts, largest) == block
