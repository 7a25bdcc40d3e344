"""triton_decode and triton_prefill on a real GPU, against the fp32 reference."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16 import linear, pack, record
from w4a16.device import current_device
from w4a16.dispatch import launcher
from w4a16.layouts import PackedWeight, pad_rows
from w4a16.layouts import pack as pack_as
from w4a16.problem import ACT_NAMES, Problem
from w4a16.reference import reference_linear
from w4a16.tuning.table import tile_for

ROWS = {"triton_decode": [1, 2, 5, 6, 16], "triton_prefill": [1, 5, 6, 17, 33, 70, 300]}
CASES = [(stem, m) for stem, rows in ROWS.items() for m in rows]
ACTS = [torch.bfloat16, torch.float16]


def call(stem: str, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.full((x.shape[0], packed.n), float("nan"), dtype=x.dtype, device="cuda")
    problem = Problem(
        m=x.shape[0],
        n=packed.n,
        k=packed.k,
        group=packed.group,
        act=ACT_NAMES[x.dtype],
        has_zeros=packed.has_zeros,
    )
    launcher(stem)(out=out, x=x, weight=packed, bias=bias, tile=tile_for(stem, problem, current_device("cuda")))
    return out


@pytest.mark.parametrize(("stem", "m"), CASES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [(72, 384, 32), (200, 512, 64), (136, 1024, 128), (40, 480, 480)])
def test_shapes(stem: str, m: int, act: torch.dtype, asym: bool, n: int, k: int, group: int) -> None:
    weight = random_weight(n, k, group=group, asym=asym, act=act)
    x, bias = torch.randn(m, k + 40, dtype=act)[:, 8 : k + 8], torch.randn(n, dtype=act)
    packed = pack_as(weight, layout="SKINNY").to("cuda")
    wanted = reference_linear(x, weight, bias)
    for layout in (packed, pad_rows(packed)):
        assert_close(call(stem, x.cuda(), layout, bias.cuda()).cpu(), wanted)


@pytest.mark.parametrize("stem", list(ROWS))
def test_real_sizes_give_the_same_bits_every_time(stem: str) -> None:
    weight = random_weight(4096, 12288, group=128, asym=True)
    packed, x = pack_as(weight, layout="SKINNY").to("cuda"), torch.randn(16, 12288).bfloat16()
    got = [call(stem, x.cuda(), packed, None) for _ in range(20)]
    assert all(torch.equal(again, got[0]) for again in got)
    assert_close(got[0].cpu(), reference_linear(x, weight))


def test_one_weight_serves_every_row_count_and_graphs() -> None:
    weight = random_weight(256, 512, group=64, asym=True)
    packed = pack(weight, device="cuda")
    for m in (1, 5, 16, 17, 100):
        x = torch.randn(m, 512).bfloat16()
        y = linear(x.cuda(), packed)
        with record() as served:
            linear(x.cuda(), packed)
        assert len(served) == 1
        graph, static = torch.cuda.CUDAGraph(), x.cuda()
        with torch.cuda.graph(graph):
            out = linear(static, packed)
        graph.replay()
        assert torch.equal(out, y)
        assert_close(y.cpu(), reference_linear(x, weight))


@pytest.mark.parametrize("m", [1, 40])
def test_four_streams_at_once(m: int) -> None:
    weight = random_weight(512, 4096, group=128)
    packed, x = pack(weight, device="cuda"), torch.randn(m, 4096).bfloat16().cuda()
    wanted = linear(x, packed)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(linear(x, packed))
    torch.cuda.synchronize()
    assert all(torch.equal(got, wanted) for got in results)
