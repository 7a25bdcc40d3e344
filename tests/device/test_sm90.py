"""sm90_decode and sm90_prefill on a real Hopper GPU, against the fp32 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, random_weight
from streams import on_4_streams

from w4a16 import Problem, linear, pack, record
from w4a16.device import current_device, known_device
from w4a16.dispatch import launcher
from w4a16.layouts import SM90, PackedWeight
from w4a16.layouts import pack as pack_as
from w4a16.reference import reference_linear
from w4a16.tuning.sm90_tiles import Sm90DecodeTile, Sm90PrefillTile
from w4a16.tuning.table import rows_of, tile_for
from w4a16.tuning.tiles import why_illegal

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or current_device("cuda").arch != "sm90", reason="needs a Hopper GPU"
)
ACTS = [torch.bfloat16, torch.float16]
SHAPES = [(72, 384, 32), (88, 768, 192), (200, 512, 64), (136, 1024, 128), (40, 480, 480), (264, 4112, 4112)]
KINDS = list(itertools.product(ACTS, [False, True], SHAPES))
PREFILL = [row.tile for row in rows_of("sm90") if row.stem == "sm90_prefill"]
PAIRS = [
    pair
    for pair in (replace(tile, split_k=2, paired=True) for tile in PREFILL)
    if why_illegal("sm90_prefill", pair, Problem(m=64, n=64, k=64, group=64), known_device("sm90")) is None
]
DECODE = [
    Sm90DecodeTile(warps=warps, parts=parts, depth=depth, split_k=split, slabs=slabs, ring=ring)
    for warps, parts, depth, split, slabs, ring in [
        *((4, 1, 8, 1, 8, 3), (4, 1, 8, 8, 8, 3), (8, 1, 4, 2, 3, 3), (8, 1, 4, 8, 3, 3), (4, 1, 2, 4, 3, 3)),
        *((4, 1, 4, 1, 3, 2), (4, 1, 16, 1, 3, 2), (8, 4, 8, 1, 3, 2), (8, 2, 4, 2, 3, 2), (8, 8, 2, 2, 3, 3)),
    ]
]
DECODE += [replace(tile, early=True, l2_ahead=True) for tile in DECODE if tile.depth == 4]


def call(
    tile: Sm90DecodeTile | Sm90PrefillTile, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The kernel of `tile`, into NaN; nothing beside the output is written."""
    stem = "sm90_decode" if isinstance(tile, Sm90DecodeTile) else "sm90_prefill"
    room = torch.full((x.shape[0] + 2, packed.n), float("nan"), dtype=x.dtype, device="cuda")
    launcher(stem)(out=room[1:-1], x=x, weight=packed, bias=bias, tile=tile)
    assert room[[0, -1]].isnan().all()
    return room[1:-1]


def agree(
    tile: Sm90DecodeTile | Sm90PrefillTile, m: int, act: torch.dtype, asym: bool, shape: tuple[int, int, int]
) -> None:
    n, k, group = shape
    weight = random_weight(n, k, group=group, asym=asym, act=act)
    x, bias = torch.randn(m, k + 48, dtype=act)[:, 16 : k + 16], torch.randn(n, dtype=act)
    packed = pack_as(weight, layout=SM90).to("cuda")
    assert_close(call(tile, x.cuda(), packed, bias.cuda()).cpu(), reference_linear(x, weight, bias))
    assert_close(call(tile, x[:, ::1].clone().cuda(), packed).cpu(), reference_linear(x, weight))


@pytest.mark.parametrize(("act", "asym", "shape"), KINDS)
def test_decode_kinds(act: torch.dtype, asym: bool, shape: tuple[int, int, int]) -> None:
    for m in (1, 5, 8):
        agree(DECODE[0], m, act, asym, shape)


@pytest.mark.parametrize(("i", "tile"), list(enumerate(DECODE)))
def test_decode_tiles(i: int, tile: Sm90DecodeTile) -> None:
    for m in (1, 8, 9, 16):
        agree(tile, m, *KINDS[(5 * i + m) % len(KINDS)][:2], (136, 2048, 128))


@pytest.mark.parametrize(("act", "asym", "shape"), KINDS)
def test_prefill_kinds(act: torch.dtype, asym: bool, shape: tuple[int, int, int]) -> None:
    tile = next(tile for tile in PREFILL if tile.block_m == 64)
    for m, split in ((1, 1), (70, 1), (33, 2)):
        agree(replace(tile, split_k=split), m, act, asym, shape)


@pytest.mark.parametrize(("i", "tile"), list(enumerate(PREFILL)))
def test_prefill_tiles(i: int, tile: Sm90PrefillTile) -> None:
    """Tails of M and N, more units of work than programs, and parts of K that do not divide it."""
    act, asym, _ = KINDS[7 * i % len(KINDS)]
    for m, split, shape in ((300, 1, (520, 512, 128)), (tile.block_m + 3, 3, (200, 2048, 128)), (3, 1, (8, 128, 128))):
        agree(replace(tile, split_k=split), m, act, asym, shape)
    agree(replace(tile, split_k=1), 40 * tile.block_m, act, asym, (1032, 256, 128))


@pytest.mark.parametrize(("i", "pair"), list(enumerate(PAIRS)))
def test_prefill_pairs(i: int, pair: Sm90PrefillTile) -> None:
    """Rows of one program of a pair alone, tails of both, more pairs than SMs, and an odd number of tiles of K."""
    act, asym, _ = KINDS[5 * i % len(KINDS)]
    for m, shape in (
        (3, (8, 256, 128)),
        (pair.block_m + 3, (200, 2112, 64)),
        (2 * pair.block_m - 1, (200, 4112, 4112)),
    ):
        agree(pair, m, act, asym, shape)
    agree(pair, 20 * pair.block_m, act, asym, (1032, 512, 32))


@pytest.mark.parametrize(("act", "asym", "shape"), KINDS[::8])
def test_prefill_in_two_launches(act: torch.dtype, asym: bool, shape: tuple[int, int, int]) -> None:
    """The rows of W or of x that a launch of their own takes, and those by another tile, split or not."""
    first = next(tile for tile in PREFILL if (tile.block_m, tile.warpgroups) == (128, 2) and not tile.registers)
    rest = next(tile for tile in PREFILL if (tile.block_m, tile.warpgroups) == (64, 1))
    n, k, group = 128 + shape[0], shape[1], shape[2]
    for m, split, where in ((150, 1, {"first_n": 128}), (70, 2, {"first_n": 128}), (150, 2, {"first_m": 128})):
        tile = replace(first, split_k=1, rest=replace(rest, split_k=split), **where)
        agree(tile, m, act, asym, (n, k, group))


@pytest.mark.parametrize(
    ("n", "k", "m", "axis"),
    [(5120, 5120, 1024, "first_n"), (19456, 1280, 200, "first_n"), (8192, 8192, 700, "first_m")],
)
def test_two_launches_where_production_takes_them(n: int, k: int, m: int, axis: str) -> None:
    """Eager, again by addresses alone, captured, and on four streams: the same bits."""
    weight = random_weight(n, k, group=128, asym=True)
    packed, bias = pack(weight, device="cuda"), torch.randn(n).bfloat16()
    problem = Problem(m=m, n=n, k=k, group=128, act="bf16", has_zeros=True)
    assert getattr(tile_for("sm90_prefill", problem, current_device("cuda")), axis) > 0
    x = torch.randn(m, k).bfloat16()
    static, static_bias, graph = x.cuda(), bias.cuda(), torch.cuda.CUDAGraph()
    first, again = linear(static, packed, static_bias), linear(x.cuda(), packed, bias.cuda())
    with torch.cuda.graph(graph):
        out = linear(static, packed, static_bias)
    out.fill_(float("nan"))
    graph.replay()
    assert_close(first.cpu(), reference_linear(x, weight, bias))
    assert torch.equal(first, again)
    assert torch.equal(out, first)
    assert all(torch.equal(got, first) for got in on_4_streams(lambda: linear(static, packed, static_bias)))


def test_one_weight_serves_every_row_count_eager_and_captured() -> None:
    weight = random_weight(1024, 2048, group=128, asym=True)
    packed = pack(weight, device="cuda")
    assert packed.layout == SM90
    served_by = {}
    for m in (1, 5, 16, 17, 100, 512):
        x = torch.randn(m, 2048).bfloat16()
        with record() as served:
            first, again = linear(x.cuda(), packed), linear(x.cuda(), packed)
        served_by[m] = {stem for stem, _ in served}
        assert len(served) == 2
        static, graph = x.cuda(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(static, packed)
        out.fill_(float("nan"))
        graph.replay()
        assert_close(first.cpu(), reference_linear(x, weight))
        assert torch.equal(first, again)
        assert torch.equal(out, first)
    assert served_by[16] == {"sm90_decode"}
    assert served_by[17] == {"sm90_prefill"}


def test_calls_alike_take_their_own_x_and_bias() -> None:
    """The second call of a kind takes the short way: no argument of the first may stay in it."""
    weight = random_weight(512, 1024, group=64, asym=True)
    packed = pack(weight, device="cuda")
    biases = [None, torch.randn(512).bfloat16(), torch.randn(512).bfloat16()]
    for _, bias in itertools.product(range(3), biases):
        for shape in ((1, 1024), (2, 3, 1024), (1, 1, 1024)):
            x = torch.randn(shape).bfloat16()
            got = linear(x.cuda(), packed, None if bias is None else bias.cuda())
            assert got.shape == (*shape[:-1], 512)
            assert_close(got.cpu(), reference_linear(x, weight, bias))
    x = torch.randn(1024, 2).bfloat16().cuda().t()  # rows that are not contiguous are copied
    for _ in range(2):
        assert_close(linear(x, packed).cpu(), reference_linear(x.cpu(), weight))


@pytest.mark.parametrize("m", [20, 64, 300])
def test_pairs_on_4_streams(m: int) -> None:
    """Clusters of launches that overlap, each with parts of its own."""
    weight = random_weight(1024, 4096, group=128, asym=True)
    packed, x = pack_as(weight, layout=SM90).to("cuda"), torch.randn(m, 4096).bfloat16().cuda()
    pair = next(pair for pair in PAIRS if pair.block_m == 128)
    wanted = call(pair, x, packed)
    got = on_4_streams(lambda: call(pair, x, packed))
    assert_close(wanted.cpu(), reference_linear(x.cpu(), weight))
    assert all(torch.equal(again, wanted) for again in got)


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_the_same_bits_100_times_on_4_streams(m: int) -> None:
    weight = random_weight(1024, 4096, group=128, asym=True)
    packed, x = pack(weight, device="cuda"), torch.randn(m, 4096).bfloat16().cuda()
    wanted = linear(x, packed)
    got = on_4_streams(lambda: linear(x, packed))
    assert_close(wanted.cpu(), reference_linear(x.cpu(), weight))
    assert all(torch.equal(again, wanted) for again in got)
