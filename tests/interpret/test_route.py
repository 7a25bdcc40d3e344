"""The route kernel in Triton's interpreter, against the torch ops."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from helpers import in_turn

from w4a16 import BadInput
from w4a16.kernels import route as kernel
from w4a16.moe.route import Route, route

ARCHETYPES = ("balanced", "uniform", "zipf1", "zipf2", "hot16", "one")


def choices(archetype: str, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Experts of each token, distinct but for `one`."""
    if archetype == "balanced":
        return (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
    if archetype == "one":
        return torch.full((tokens, top_k), experts - 1)
    rank = torch.arange(1, experts + 1).float()
    weight = {"uniform": rank**0, "zipf1": 1 / rank, "zipf2": rank**-2, "hot16": torch.where(rank <= 16, 1.0, 0.01)}
    gumbel = -torch.empty(tokens, experts).exponential_().log()
    return (weight[archetype].log() + gumbel).topk(top_k).indices


def agree(ids: torch.Tensor, experts: int, block: int) -> None:
    got, launches = kernel.route_launches(ids, experts, block)
    for launch in launches:
        launch.run()
    wanted = route(ids, experts, block)
    for name in (field.name for field in fields(Route)):
        if name == "block":
            assert got.block == wanted.block == block
        else:
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize("archetype", ARCHETYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "block"), [(40, 8, 2, 16), (17, 60, 6, 8)])
def test_archetypes(archetype: str, tokens: int, experts: int, top_k: int, block: int) -> None:
    ids = choices(archetype, tokens, experts, top_k)
    agree(ids, experts, block)
    agree(torch.where(torch.rand(ids.shape) < 0.2, -1, ids).int(), experts, block)
    agree(torch.where(torch.rand(ids.shape) < 0.2, experts + 1, ids), experts, block)


@pytest.mark.parametrize(
    ("archetype", "tokens", "experts", "top_k", "block"),
    [("one", 1, 8, 1, 16), ("zipf1", 64, 128, 8, 16), ("hot16", 70, 256, 8, 32), ("zipf2", 30, 512, 10, 16)],
)
def test_sizes(archetype: str, tokens: int, experts: int, top_k: int, block: int) -> None:
    agree(choices(archetype, tokens, experts, top_k), experts, block)


@pytest.mark.parametrize("archetype", ["uniform", "one"])
def test_counted_first(archetype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More slots than a program ranks at a time."""
    monkeypatch.setattr(kernel, "MOST_AT_ONCE", 512)
    monkeypatch.setattr(kernel, "CHUNK", 256)
    monkeypatch.setattr(kernel, "MOST_CHUNKS", 5)  # of two steps
    monkeypatch.setattr(kernel, "MOST_COUNTS", 128)
    ids = choices(archetype, 400, 20, 6)
    agree(torch.where(torch.rand(ids.shape) < 0.2, -1, ids), 20, 16)


@pytest.mark.parametrize("archetype", ARCHETYPES)
@pytest.mark.parametrize("block", [32, 64, 96, 128])
def test_the_order_of_blocks(archetype: str, block: int) -> None:
    ids = choices(archetype, 300, 12, 4)
    ids = torch.where(torch.rand(ids.shape) < 0.1, -1, ids)
    turns = kernel.Turns.of(ids, 12, block)
    turns.order.fill_(-7)
    turns.taken.fill_(9)
    routing, launches = kernel.route_launches(ids, 12, block, turns=turns)
    for launch in launches:
        launch.run()
    assert not turns.taken.any()
    used = int(routing.num_tokens_post_padded) // block
    rows = (routing.sorted_token_ids.view(-1, block)[:used] < ids.numel()).sum(1)
    boxes = -(-rows // kernel.BOX)
    assert turns.order[:used].tolist() == in_turn(boxes.tolist(), kernel.EVERY.value)
    assert (turns.order[used:] == -7).all()


def test_more_blocks_than_can_be_counted() -> None:
    with pytest.raises(BadInput, match="blocks"):
        kernel.Turns.of(torch.empty((1 << 19, 10), dtype=torch.int32, device="meta"), 128, 128)


def test_blocks_of_one() -> None:
    agree(torch.tensor([[3, -1], [0, 4]]), 4, 1)
    agree(torch.randint(-1, 9, (3, 10)), 8, 1)


def test_nothing_routed_here() -> None:
    agree(torch.full((20, 4), -1), 8, 16)
