"""The sums over a token's experts, by Triton's interpreter, against the same in torch."""

from __future__ import annotations

import pytest
import torch

from w4a16.kernels._token_sums import placed_sums, token_sums


def expected(y: torch.Tensor, rows: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    """rows [T, top_k], less than 0: none."""
    weight = torch.ones(rows.shape) if share is None else share.float()
    each = torch.where(rows.unsqueeze(2) < 0, 0.0, y[rows.clamp(min=0)].float() * weight.unsqueeze(2))
    return each.sum(1)


@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 10])
@pytest.mark.parametrize("act", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_where_routing_put_them(top_k: int, act: torch.dtype, shared: bool) -> None:
    """More columns than a program takes, experts elsewhere (-1), rows of nobody poisoned."""
    tokens, n = 5, 1100
    rows = torch.randperm(100)[: tokens * top_k].view(tokens, top_k)
    rows[1, 0] = rows[4, -1] = -1
    y = torch.full((100, n), torch.nan, dtype=act)
    y[rows[rows >= 0]] = torch.randn(int((rows >= 0).sum()), n).to(act)
    share = torch.rand(tokens, top_k) if shared else None
    room = torch.full((tokens + 2, n), torch.nan, dtype=torch.bfloat16)
    placed_sums(room[1:-1], y, rows.int(), shares=share, pdl=False).run()
    # Rounded to nearest once: half of bf16's last bit, and what the order of fp32 sums makes of it.
    torch.testing.assert_close(room[1:-1].float(), expected(y, rows, share), rtol=1.01 * 2**-8, atol=1e-6)
    assert room[[0, -1]].isnan().all()


@pytest.mark.parametrize("top_k", [1, 6, 10])
@pytest.mark.parametrize("placed", [True, False])
def test_rows_in_the_order_of_slots(top_k: int, placed: bool) -> None:
    """Slots of experts elsewhere were never written."""
    tokens, n, experts = 4, 300, 7
    ids = torch.randint(-1, experts + 1, (tokens, top_k))
    served = (ids >= 0) & (ids < experts)
    y = torch.full((tokens * top_k, n), torch.nan)
    y[served.flatten()] = torch.randn(int(served.sum()), n)
    share, out = torch.rand(tokens, top_k), torch.full((tokens, n), torch.nan)
    if placed:
        placed_sums(out, y, ids, experts, share, pdl=False).run()
    else:
        token_sums(out, y, ids, share, experts).run()
    rows = torch.where(served, torch.arange(tokens * top_k).view(tokens, top_k), -1)
    torch.testing.assert_close(out, expected(y, rows, share), rtol=1e-5, atol=1e-5)
