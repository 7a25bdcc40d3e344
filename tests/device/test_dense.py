"""The kernel that serves every device, on a real GPU, against the fp32 reference."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16 import env, linear, pack, record
from w4a16.dispatch import choose, serve_linear
from w4a16.reference import reference_linear


@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [32, 128, 512])
@pytest.mark.parametrize("m", [1, 5, 17, 300])
@pytest.mark.parametrize("asym", [False, True])
def test_dense(act: torch.dtype, group: int, m: int, asym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(272, 512, group=group, asym=asym, act=act, act_order=asym)
    x, bias = torch.randn(m, 512, dtype=act), torch.randn(272, dtype=act)
    monkeypatch.setattr(env, "FORCED_KERNEL", "dense")
    choose.cache_clear()
    serve_linear.cache_clear()
    with record() as served:
        got = linear(x.cuda(), pack(weight, device="cuda"), bias.cuda())
    assert [stem for stem, _ in served] == ["dense"]
    assert_close(got.cpu(), reference_linear(x, weight, bias))


def test_dense_in_a_cuda_graph() -> None:
    weight = random_weight(64, 128, group=32, asym=True, act=torch.float32)
    packed, x = pack(weight, device="cuda"), torch.randn(3, 128, device="cuda")
    linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, packed)
    x.copy_(torch.randn(3, 128))
    graph.replay()
    assert_close(out.cpu(), reference_linear(x.cpu(), weight))
