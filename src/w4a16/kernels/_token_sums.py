"""The sum over the rows of each token, in the order of its slots: the last launch of an expert layer."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..compat import narrowed
from ._launch import Launch

SUM_BLOCK_N = 256
PLACED_BLOCK_N, PLACED_MOST = 1024, 8192  # columns of a program, and elements of y: 64 a thread


@triton.jit
def _token_sums(
    out_ptr,  # [T, N]
    y_ptr,  # [T * TOP_K, N]
    ids_ptr,  # [T, TOP_K]
    shares_ptr,  # [T, TOP_K], or None: all 1
    N,
    out_stride,
    y_stride,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum over a token's slots, in their order; slots of experts elsewhere were never written and are not read."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(TOP_K):
        slot = token * TOP_K + i
        expert = tl.load(ids_ptr + slot)
        served = (expert >= 0) & (expert < EXPERTS)
        y = tl.load(y_ptr + slot * y_stride + n, mask=served & (n < N), other=0.0).to(tl.float32)
        if shares_ptr is not None:
            y = tl.where(served, y * tl.load(shares_ptr + slot).to(tl.float32), 0.0)
        total += y
    tl.store(out_ptr + token * out_stride + n, narrowed(total, out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _placed_sums(
    out_ptr,  # [T, N]
    y_ptr,  # [positions, N]
    position_ptr,  # [T * TOP_K]: rows of y; all but 0 to `limit` - 1: none
    shares_ptr,  # [T * TOP_K], or None: all 1
    limit,
    N,
    out_stride,
    y_stride,
    TOP_K: tl.constexpr,
    ROOM: tl.constexpr,  # TOP_K, or the next power of two
    SORTED: tl.constexpr,  # else position_ptr holds experts, and a slot stands at its own number
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The same on Hopper, of rows that stand where routing put them, in a fixed order."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, ROOM)
    slot = token * TOP_K + i
    position = tl.load(position_ptr + slot, mask=i < TOP_K, other=-1).to(tl.int64)
    served = ((position >= 0) & (position < limit))[:, None]
    row = position if SORTED else slot
    if shares_ptr is not None:
        share = tl.load(shares_ptr + slot, mask=i < TOP_K, other=0.0).to(tl.float32)[:, None]
    if PDL:
        gdc_wait()  # for y: the route and the router's weights are of kernels before that
        gdc_launch_dependents()
    at = y_ptr + row[:, None] * y_stride + n[None, :]
    y = tl.load(at, mask=served & (n < N)[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
    if shares_ptr is not None:
        y = tl.where(served, y * share, 0.0)
    total = tl.sum(y, 0)
    tl.store(out_ptr + token * out_stride + n, narrowed(total, out_ptr.dtype.element_ty), mask=n < N)


def token_sums(out: Tensor, y: Tensor, ids: Tensor, shares: Tensor | None, experts: int) -> Launch:
    """out [T, N]: the sums over the slots y [T * top_k, N] of each token, times their shares [T, top_k]."""
    tokens, top_k = ids.shape
    return Launch(
        fn=_token_sums,
        grid=(tokens, triton.cdiv(y.shape[1], SUM_BLOCK_N)),
        args={
            "out_ptr": out,
            "y_ptr": y,
            "ids_ptr": ids,
            "shares_ptr": shares,
            "N": y.shape[1],
            "out_stride": out.stride(0),
            "y_stride": y.stride(0),
        },
        constants={"EXPERTS": experts, "TOP_K": top_k, "BLOCK_N": SUM_BLOCK_N},
        options={"num_warps": 4},
    )


def placed_sums(
    out: Tensor, y: Tensor, position: Tensor, experts: int = 0, shares: Tensor | None = None, pdl: bool = True
) -> Launch:
    """out [T, N]: the sums over the rows of y that stand at the positions [T * top_k] of each token's slots (Hopper).

    experts  0, or how many: `position` holds ids of experts then, and row i of y is slot i's
    shares   [T * top_k]: multiply the rows, in fp32; None: nothing does
    pdl      waits on the device for the kernel before, and lets the next one start
    """
    top_k = position.numel() // out.shape[0]
    room = triton.next_power_of_2(top_k)
    columns = min(PLACED_BLOCK_N, PLACED_MOST // room)
    return Launch(
        fn=_placed_sums,
        grid=(out.shape[0], triton.cdiv(y.shape[1], columns)),
        args={
            "out_ptr": out,
            "y_ptr": y,
            "position_ptr": position,
            "shares_ptr": shares,
            "limit": experts or y.shape[0],
            "N": y.shape[1],
            "out_stride": out.stride(0),
            "y_stride": y.stride(0),
        },
        constants={"TOP_K": top_k, "ROOM": room, "SORTED": experts == 0, "BLOCK_N": columns, "PDL": pdl},
        options={"num_warps": 4} | ({"launch_pdl": True} if pdl else {}),
    )
