"""The sum of the parts of a split K, read in the order that the warpgroups of sm90_prefill write them."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from w4a16.kernels import _add_parts
from w4a16.kernels._add_parts import RASTER_M, addition


@pytest.fixture(autouse=True)
def _without_dependent_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one kernel after the other."""
    for name in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(_add_parts, name, lambda: None)


@pytest.mark.parametrize(
    ("m", "n", "block_m", "warpgroups", "split"),
    [
        (70, 200, 32, 1, 2),
        (300, 520, 128, 2, 3),
        (100, 264, 96, 2, 2),
        (37, 72, 8, 3, 2),
        (513, 136, 256, 2, 4),
        (300, 72, 208, 1, 3),
    ],
)
def test_the_sum_of_parts(m: int, n: int, block_m: int, warpgroups: int, split: int) -> None:
    rows = 64 * warpgroups
    blocks_m, blocks_n = -(-m // block_m), -(-n // rows)
    whole = torch.randn(split, blocks_n * rows, blocks_m * block_m)
    parts = torch.full((blocks_m * blocks_n * split, rows, block_m), float("nan"))
    for tile in range(blocks_m * blocks_n):
        band = tile // (RASTER_M.value * blocks_n)
        tall = min(blocks_m - band * RASTER_M.value, RASTER_M.value)
        inside = tile % (RASTER_M.value * blocks_n)
        i, j = band * RASTER_M.value + inside % tall, inside // tall
        for part in range(split):
            sums = whole[part, j * rows : (j + 1) * rows, i * block_m : (i + 1) * block_m]
            # [warpgroup, warp, row half, r, 8 columns, c, d]: a thread has row halves and d of (warp, r, c)
            sums = sums.reshape(warpgroups, 4, 2, 8, block_m // 8, 4, 2).permute(0, 4, 1, 3, 5, 2, 6)
            parts[tile * split + part] = sums.reshape(rows, block_m)
    out, bias = torch.empty((m, n), dtype=torch.float16), torch.randn(n).half()
    addition(out, parts, bias, m, n, split, rows, block_m).run()
    assert_close(out, whole.sum(0)[:n, :m].T + bias)
