"""The dequantising kernel of `dense` in Triton's interpreter: the same bits as dequantising in torch."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight

from w4a16.kernels._dense_rows import dense_rows
from w4a16.layouts import SKINNY, pack, pad_rows


@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [(24, 256, 32), (13, 1152, 128), (8, 96, 96), (9, 72, 24), (17, 64, 8)])
@pytest.mark.parametrize("pad", [False, True])
def test_bits(act: torch.dtype, asym: bool, n: int, k: int, group: int, pad: bool) -> None:
    weight = random_weight(n, k, group=group, asym=asym, act=act)
    packed = pack(weight, layout=SKINNY)
    out = torch.full((n, k + 16), torch.nan, dtype=act)
    dense_rows(out[:, :k], pad_rows(packed) if pad else packed, 0).run()
    assert torch.equal(out[:, :k], weight.dequantize(act))
    assert out[:, k:].isnan().all()


@pytest.mark.parametrize("start", [8, 64])
def test_rows_from_the_middle(start: int) -> None:
    weight = random_weight(100, 128, group=64, asym=True)
    out = torch.full((20, 128), torch.nan, dtype=torch.bfloat16)
    dense_rows(out, pack(weight, layout=SKINNY), start).run()
    assert torch.equal(out, weight.dequantize()[start : start + 20])
