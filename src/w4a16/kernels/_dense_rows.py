"""Rows of W dequantised into memory, for BLAS: a Triton kernel over layout SKINNY, bound by the bytes it writes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..compat import narrowed
from ..layouts import PackedWeight
from ..weight import CODES_PER_WORD
from ._launch import Launch

BLOCK_N, BLOCK_WORDS, WARPS = 8, 128, 4  # 64 weights a thread, 16 bytes a store


@triton.jit(do_not_specialize=["N"])
def _dense_rows(
    out_ptr,  # [N, K]
    codes_ptr,  # [N, K//8] int32, layout SKINNY
    scales_ptr,  # [N, K//G]
    zeros_ptr,  # [ceil(N/8), K//G] int32, or None: every zero point is 8
    N,
    WORDS,
    out_stride,
    codes_stride,
    scales_stride,
    zeros_stride,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    inside = (rows[:, None] < N) & (words[None, :] < WORDS)
    n, word = rows.to(tl.int64)[:, None], words[None, :]
    group = word * 8 // GROUP
    codes = tl.load(codes_ptr + n * codes_stride + word, mask=inside, other=0)
    scale = tl.load(scales_ptr + n * scales_stride + group, mask=inside, other=0.0).to(tl.float32)
    value = tl.arange(0, 8)
    shift = (value // 2 * 4 + value % 2 * 16)[None, None, :]
    levels = (codes[:, :, None] >> shift) & 0xF
    if zeros_ptr is not None:
        packed = tl.load(zeros_ptr + n // 8 * zeros_stride + group, mask=inside, other=0)
        levels -= ((packed >> (rows[:, None] % 8 * 4)) & 0xF)[:, :, None]
    else:
        levels -= 8
    weights = levels.to(tl.float32) * scale[:, :, None]
    at = out_ptr + (n * out_stride + word * 8)[:, :, None] + value[None, None, :]
    tl.store(at, narrowed(weights, out_ptr.dtype.element_ty), mask=inside[:, :, None])


def dense_rows(out: Tensor, weight: PackedWeight, start: int) -> Launch:
    """Writes rows start.. of W, as many as `out` [rows, K] has; start is a multiple of 8, the group too."""
    n, words = len(out), weight.k // CODES_PER_WORD
    zeros = None if weight.zeros is None else weight.zeros[start // CODES_PER_WORD :]
    return Launch(
        fn=_dense_rows,
        grid=(triton.cdiv(n, BLOCK_N), triton.cdiv(words, BLOCK_WORDS)),
        args={
            "out_ptr": out,
            "codes_ptr": weight.codes[start:],
            "scales_ptr": weight.scales[start:],
            "zeros_ptr": zeros,
            "N": n,
            "WORDS": words,
            "out_stride": out.stride(0),
            "codes_stride": weight.codes.stride(0),
            "scales_stride": weight.scales.stride(0),
            "zeros_stride": 0 if zeros is None else zeros.stride(0),
        },
        constants={"GROUP": weight.group, "BLOCK_N": BLOCK_N, "BLOCK_WORDS": BLOCK_WORDS},
        options={"num_warps": WARPS},
    )
