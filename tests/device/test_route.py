"""The route kernel on a real GPU, against the torch ops."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from helpers import in_turn

from w4a16.kernels.route import BOX, EVERY, Turns, route_launches
from w4a16.moe.route import Route, route


@pytest.mark.parametrize("tokens", [1, 40, 127, 700, 4096, 65536])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 6), (128, 8), (512, 10)])
def test_as_torch_does(tokens: int, experts: int, top_k: int) -> None:
    tokens = min(tokens, 524288 // top_k)
    rank = torch.arange(1, experts + 1).float().log()
    for skew in (0, 2, 8):
        ids = (-torch.empty(tokens, experts).exponential_().log() - skew * rank).topk(top_k).indices
        for chosen in (ids, torch.where(torch.rand(ids.shape) < 0.2, -1, ids).int()):
            for block in (1, 8 if tokens < 4096 else 128):
                got, wanted = route(chosen.cuda(), experts, block), route(chosen, experts, block)
                for name in (field.name for field in fields(Route) if field.name != "block"):
                    assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), (name, block)


@pytest.mark.parametrize("tokens", [3, 700, 20000])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 6), (128, 8), (512, 10)])
@pytest.mark.parametrize("block", [32, 64, 96, 128])
def test_the_order_of_blocks(tokens: int, experts: int, top_k: int, block: int) -> None:
    rank = torch.arange(1, experts + 1).float().log()
    ids = (-torch.empty(tokens, experts).exponential_().log() - 2 * rank).topk(top_k).indices.cuda()
    turns = Turns.of(ids, experts, block)
    turns.taken.fill_(9)
    routing, launches = route_launches(ids, experts, block, turns=turns)
    for launch in launches:
        launch.run()
    assert not turns.taken.any()
    used = int(routing.num_tokens_post_padded) // block
    rows = (routing.sorted_token_ids.view(-1, block)[:used] < ids.numel()).sum(1)
    boxes = -(-rows // BOX)
    assert turns.order[:used].tolist() == in_turn(boxes.tolist(), EVERY.value)
