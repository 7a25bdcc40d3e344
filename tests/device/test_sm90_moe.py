"""sm90_moe, and w4a16.moe by it, on a real Hopper GPU, against the fp32 reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_close, fitting, random_weight
from streams import on_4_streams

from w4a16 import QuantizedWeight, moe, pack_experts, record
from w4a16.bench.expert_cases import EXPERTS, random_experts, some_experts
from w4a16.device import current_device
from w4a16.dispatch import choose
from w4a16.kernels.sm90_moe import sm90_moe
from w4a16.layouts import SM90
from w4a16.layouts import pack as pack_as
from w4a16.nn import W4A16Experts
from w4a16.problem import Problem
from w4a16.reference import ACTIVATIONS, reference_moe
from w4a16.tuning.sm90_moe_tiles import WIDE, Sm90MoeTile
from w4a16.tuning.table import rows_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or current_device("cuda").arch != "sm90", reason="needs a Hopper GPU"
)
BF16, FP16 = torch.bfloat16, torch.float16
NARROWEST = Sm90MoeTile(block_m=32, stages=8)
TILES = list(dict.fromkeys(row.tile for row in rows_of("sm90") if row.stem == "sm90_moe"))
ROUTINGS = ("balanced", "uniform", "zipf1", "zipf2", "hot16", "one")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """NaN in every workspace, so that nothing which a kernel forgets to write passes."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def routed(routing: str, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Experts of each token, distinct but for `one`."""
    if routing == "balanced":
        return (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
    if routing == "one":
        return torch.full((tokens, top_k), experts - 1)
    rank = torch.arange(1, experts + 1).float()
    weight = {"uniform": rank**0, "zipf1": 1 / rank, "zipf2": rank**-2, "hot16": torch.where(rank <= 16, 1.0, 0.01)}
    gumbel = -torch.empty(tokens, experts).exponential_().log()
    return (weight[routing].log() + gumbel).topk(top_k).indices


def weights(
    experts: int, hidden: int, inter: int, group: int, gated: bool = True, **kind: Any
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """group 0: one for all of K."""
    w13 = random_weight((2 if gated else 1) * inter, hidden, group=group or hidden, experts=experts, **kind)
    return w13, random_weight(hidden, inter, group=group or inter, experts=experts, **kind)


def check(
    tile: Sm90MoeTile,
    ids: torch.Tensor,
    *,
    experts: int = 8,
    hidden: int = 256,
    inter: int = 128,
    group: int = 128,
    act: torch.dtype = BF16,
    asym: bool = False,
    act_order: bool = False,
    gated: bool = True,
    activation: str = "silu",
    weight_input: bool = False,
) -> None:
    """The kernel of `tile` for rows of x that are not contiguous; nothing beside the output is written."""
    plain = weights(experts, hidden, inter, group, gated, act=act, asym=asym, act_order=act_order)
    tokens = len(ids)
    n = (2 if gated else 1) * inter
    tile = fitting(tile, Problem(m=tokens, n=n, k=hidden, group=group or hidden, act="bf16", has_zeros=asym))
    whole, share = torch.randn(tokens, hidden + 32, dtype=act), torch.rand(ids.shape)
    x = whole[:, 16 : hidden + 16]
    room = torch.full((tokens + 2, hidden), torch.nan, dtype=act, device="cuda")
    how: dict[str, Any] = {"activation": activation, "gated": gated, "weight_input": weight_input}
    w13, w2 = (pack_as(w, layout=SM90).to("cuda") for w in plain)
    sm90_moe(
        out=room[1:-1], x=x.cuda(), w13=w13, w2=w2, topk_weights=share.cuda(), topk_ids=ids.cuda(), tile=tile, **how
    )
    assert room[[0, -1]].isnan().all()
    wanted = reference_moe(x, *plain, share, ids, **how)
    if wanted.any():
        assert_close(room[1:-1].cpu(), wanted)
    else:
        assert not room[1:-1].any()


@pytest.mark.parametrize(
    ("act", "asym", "group"), list(itertools.product((BF16, FP16), (False, True), (32, 64, 128, 0)))
)
def test_kinds(act: torch.dtype, asym: bool, group: int) -> None:
    check(NARROWEST, routed("uniform", 50, 8, 2), act=act, asym=asym, group=group)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.block_m in WIDE], ids=str)
def test_tiles(tile: Sm90MoeTile, routing: str) -> None:
    """Blocks of every width, tails of rows of W, more units of work than programs, an odd number of steps."""
    check(tile, routed(routing, 300, 8, 2))
    check(tile, routed(routing, 900, 24, 2), experts=24, hidden=384, inter=640, asym=True)
    check(tile, routed(routing, 70, 60, 2), experts=60, hidden=320, inter=192, group=64)
    check(tile, routed(routing, 900, 24, 2), experts=24, hidden=512, inter=320, group=64)


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("tokens", [64, 200])
@pytest.mark.parametrize("k", [1984, 2000, 2880])  # 31, 32 and 45 tiles
def test_a_group_that_is_all_of_k(k: int, tokens: int, asym: bool) -> None:
    """By the tile that serves it."""
    problem = Problem(m=tokens, n=2 * 320, k=k, group=k, act="bf16", has_zeros=asym, experts=8, top_k=2)
    tile = choose(problem, current_device("cuda")).tile
    check(tile, routed("uniform", tokens, 8, 2), hidden=k, inter=320, group=0, asym=asym)


def expected(
    x: torch.Tensor, w13: QuantizedWeight, w2: QuantizedWeight, share: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """What reference_moe gives, an expert at a time, which many tokens of many experts need."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.arange(w13.experts, device=x.device).split(1):
        gate_up, down = (some_experts(weight, expert).dequantize(torch.float32)[0] for weight in (w13, w2))
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ gate_up.T).chunk(2, dim=1)
        y = (ACTIVATIONS["silu"](gate) * up) @ down.T
        out.index_add_(0, token, y * share[token, slot].unsqueeze(1))
    return out


@pytest.mark.parametrize("routing", ["uniform", "zipf2"])
@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.block_m in WIDE], ids=str)
def test_many_experts_50_times(tile: Sm90MoeTile, routing: str) -> None:
    """A served model's layer, of which each program takes several units: right, and the same bits at every launch."""
    shape, tokens = EXPERTS["qwen3.5-35b-a3b"], 1024
    tile = fitting(tile, shape.problem(tokens, "bf16", has_zeros=True))
    plain = random_experts(shape, act="bf16", has_zeros=True, device=torch.device("cuda"))
    w13, w2 = (pack_as(weight, layout=SM90) for weight in plain)
    x = torch.randn(tokens, shape.hidden, device="cuda").bfloat16()
    ids = routed(routing, tokens, shape.experts, shape.top_k).cuda()
    share = torch.rand(ids.shape, device="cuda")

    def run() -> torch.Tensor:
        out = torch.empty_like(x)
        given: dict[str, Any] = {"w13": w13, "w2": w2, "topk_weights": share, "topk_ids": ids}
        sm90_moe(out=out, x=x, **given, activation="silu", gated=True, weight_input=False, tile=tile)
        return out

    once = run()
    assert all(torch.equal(once, other) for other in on_4_streams(run, 50))
    torch.use_deterministic_algorithms(False)  # which cuBLAS refuses, and the reference needs
    assert_close(once, expected(x, *plain, share, ids))


@pytest.mark.parametrize(("activation", "gated"), list(itertools.product(sorted(ACTIVATIONS), (True, False))))
def test_activations(activation: str, gated: bool) -> None:
    check(NARROWEST, routed("uniform", 40, 8, 2), activation=activation, gated=gated, act=FP16)


@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.block_m != 1], ids=str)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (60, 2), (128, 6), (256, 8), (512, 10)])
def test_routings(tile: Sm90MoeTile, experts: int, top_k: int) -> None:
    """Experts elsewhere, by -1 and by numbers past the last; experts that nobody routes to; nothing here at all."""
    ids = routed("uniform", 33, experts, top_k)
    ids[torch.rand(ids.shape) < 0.2] = -1
    ids[3, 0] = experts
    check(tile, ids, experts=experts, hidden=128, inter=64, group=64)
    check(tile, routed("one", 33, experts, top_k), experts=experts, hidden=128, inter=64, group=64)
    check(tile, ids, experts=experts, hidden=128, inter=128)
    check(tile, torch.full((5, top_k), -1), experts=experts, hidden=128, inter=64, group=64)


def test_router_weights_on_the_input() -> None:
    check(NARROWEST, routed("zipf1", 60, 8, 1), weight_input=True, activation="gelu")


def test_act_order() -> None:
    check(NARROWEST, routed("uniform", 60, 8, 2), act_order=True, asym=True)
    check(next(tile for tile in TILES if tile.block_m == 1), routed("uniform", 2, 8, 2), act_order=True)


@pytest.mark.parametrize("tokens", [1, 7, 40, 200, 1500])
def test_one_packed_copy_serves_every_number_of_tokens(tokens: int) -> None:
    """Eager, repeated and captured; the captured graph follows what its ids hold later."""
    plain = weights(16, 512, 256, 128, asym=True)
    packed = pack_experts(*plain, device="cuda")
    assert [w.layout for w in packed] == [SM90, SM90]
    x, share = torch.randn(tokens, 512).bfloat16(), torch.rand(tokens, 4)
    ids, later = routed("uniform", tokens, 16, 4), routed("zipf2", tokens, 16, 4)
    static = [x.cuda(), share.cuda(), ids.cuda()]
    with record() as served:
        first, again = (moe(static[0], *packed, *static[1:]) for _ in range(2))
    assert {stem for stem, _ in served} == {"sm90_moe"}
    assert torch.equal(first, again)
    assert_close(first.cpu(), reference_moe(x, *plain, share, ids))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(static[0], *packed, *static[1:])
    static[2].copy_(later)
    out.fill_(torch.nan)
    graph.replay()
    assert_close(out.cpu(), reference_moe(x, *plain, share, later))


def test_the_module_and_expert_maps() -> None:
    plain = weights(16, 256, 128, 64)
    layer = W4A16Experts(16)
    layer.set(*pack_experts(*plain, device="cuda"))
    x, share, ids = torch.randn(20, 256).bfloat16(), torch.rand(20, 4), routed("uniform", 20, 16, 4)
    assert_close(layer(x.cuda(), ids.cuda(), share.cuda()).cpu(), reference_moe(x, *plain, share, ids))
    local = torch.full((32,), -1)
    local[8:24] = torch.arange(16)
    spread = routed("uniform", 20, 32, 4)
    got = moe(x.cuda(), layer.w13.get(), layer.w2.get(), share.cuda(), spread.cuda(), expert_map=local.cuda())
    assert_close(got.cpu(), reference_moe(x, *plain, share, local[spread]))


@pytest.mark.parametrize("tokens", [1, 20, 100, 600])
def test_the_same_bits_100_times_on_4_streams(tokens: int) -> None:
    packed = pack_experts(*weights(16, 512, 256, 128), device="cuda")
    x, share = torch.randn(tokens, 512).bfloat16().cuda(), torch.rand(tokens, 4).cuda()
    ids = routed("zipf1", tokens, 16, 4).cuda()
    once = moe(x, *packed, share, ids)
    assert all(torch.equal(once, other) for other in on_4_streams(lambda: moe(x, *packed, share, ids)))
