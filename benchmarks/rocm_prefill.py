"""The source's prefill kernel, to compare with: gfx11_model.py and isa_prefill.py compile it.

It is the Triton kernel of the gfx11 branch of ROCm's vLLM, written anew from its description, before and after its #953
(bf16: subtract the zero point as floats or as integers) and #879 (a wider tile; four K tiles a trip): masked loads,
three interleaves, a shift, the zero point in the activation dtype, one scale a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from w4a16.kernels._launch import Launch
from w4a16.problem import ACT_DTYPES, Problem
from w4a16.tuning.tiles import PrefillTile


@triton.jit
def _source(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N, K//8] int32, nibble order 0 2 4 6 1 3 5 7
    scales_ptr,  # [N, K//G]
    zeros_ptr,  # [N, K//G] in the activation dtype, or None
    M,
    N,
    K,
    K8,
    groups,
    GROUP: tl.constexpr,
    INT_SUBTRACT: tl.constexpr,
    UNROLL_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    shift = column % 8 // 2 * 4 + column % 2 * 16
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for trip in range(tl.cdiv(K, BLOCK_K * UNROLL_K)):
        for part in tl.static_range(UNROLL_K):
            step = trip * UNROLL_K + part
            k = step * BLOCK_K + column
            word = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
            codes = tl.load(
                codes_ptr + n[:, None] * K8 + word[None, :], mask=(n[:, None] < N) & (word[None, :] < K8), other=0
            )
            codes = tl.interleave(codes, codes)
            codes = tl.interleave(codes, codes)
            codes = tl.interleave(codes, codes)
            codes = (codes >> shift[None, :]) & 0xF
            group = step * BLOCK_K // GROUP
            scale = tl.load(scales_ptr + n * groups + group, mask=n < N, other=0.0)
            if zeros_ptr is None:
                w = (codes - 8).to(x.dtype) * scale[:, None]
            else:
                zero = tl.load(zeros_ptr + n * groups + group, mask=n < N, other=0.0)
                if INT_SUBTRACT:
                    w = (codes - zero.to(tl.int32)[:, None]).to(x.dtype) * scale[:, None]
                else:
                    w = (codes.to(x.dtype) - zero[:, None]) * scale[:, None]
            acc = tl.dot(x, tl.trans(w), acc)
    at = out_ptr + m[:, None] * N + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def source_launch(problem: Problem, tile: PrefillTile) -> Launch:
    """Its launch over tensors without memory, to be compiled; `tile.dequant` says how zero points are subtracted."""
    m, n, k, group = problem.m, problem.n, problem.k, problem.group

    def empty(*shape: int, dtype: torch.dtype = ACT_DTYPES[problem.act]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return Launch(
        fn=_source,
        grid=(triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n)),
        args={
            "out_ptr": empty(m, n),
            "x_ptr": empty(m, k),
            "codes_ptr": empty(n, k // 8, dtype=torch.int32),
            "scales_ptr": empty(n, k // group),
            "zeros_ptr": empty(n, k // group) if problem.has_zeros else None,
            "M": m,
            "N": n,
            "K": k,
            "K8": k // 8,
            "groups": k // group,
        },
        constants={
            "GROUP": group,
            "INT_SUBTRACT": tile.dequant == "int_subtract",
            "UNROLL_K": tile.unroll_k,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
