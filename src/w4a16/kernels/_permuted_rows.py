"""Rows of x in the order of the route, their channels in that of their expert's act-order, for kernels that copy rows
whole."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..moe.route import Route
from ._launch import Launch

BLOCK_K = 1024


@triton.jit(do_not_specialize=["slots"])
def _permuted_rows(
    out_ptr,  # [positions, K]
    x_ptr,  # [slots / TOP_K, K]; no TOP_K: [positions, K]
    perm_ptr,  # [E, K] int64
    sorted_ptr,  # [positions] int32: slots; padding is `slots`
    expert_ptr,  # [positions / BLOCK_M] int32; -1: no work
    slots,
    K,
    x_stride,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows that are padding are not written: whoever reads them masks them, or has no use for what comes of them."""
    position = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_ptr + position // BLOCK_M).to(tl.int64)
    slot = tl.load(sorted_ptr + position)
    if (expert < 0) | (slot >= slots):
        return
    row = position if TOP_K is None else slot // TOP_K
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.load(perm_ptr + expert * K + k, mask=k < K, other=0)
    x = tl.load(x_ptr + row * x_stride + channel, mask=k < K)
    tl.store(out_ptr + position * K + k, x, mask=k < K)


def permuted_rows(x: Tensor, perm: Tensor, routing: Route, top_k: int | None) -> tuple[Tensor, Launch]:
    """[positions, K]: the routed rows of x by `perm` [E, K] of their experts, and the launch that fills it.

    top_k: the row of a slot is slot // top_k; None: rows of x stand in the order of positions.
    """
    positions, k = routing.sorted_token_ids.numel(), x.shape[1]
    out = x.new_empty((positions, k))
    launch = Launch(
        fn=_permuted_rows,
        grid=(positions, triton.cdiv(k, BLOCK_K)),
        args={
            "out_ptr": out,
            "x_ptr": x,
            "perm_ptr": perm.contiguous(),
            "sorted_ptr": routing.sorted_token_ids,
            "expert_ptr": routing.expert_ids,
            "slots": routing.position.numel(),
            "K": k,
            "x_stride": x.stride(0),
        },
        constants={"TOP_K": top_k, "BLOCK_M": routing.block, "BLOCK_K": BLOCK_K},
        options={"num_warps": 4},
    )
    return out, launch
