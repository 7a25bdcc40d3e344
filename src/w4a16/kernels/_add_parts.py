"""The sum of the parts of a split K, in a fixed order: the second launch of sm90_prefill where it needs one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._launch import Launch

RASTER_M = gl.constexpr(8)  # blocks of M that walk over N together, so that x and W are read from the L2 cache
PART_N, PART_M = 64, 32  # of one program: one warpgroup's rows of W


@triton.jit(do_not_specialize=["M"])
def _add_parts(
    out_ptr,  # [M, N]
    parts_ptr,  # [blocks of N and M in the order of unit_of, SPLIT, ROWS / 64, BLOCK_M / 8, warp, r, c, half, d] fp32
    bias_ptr,  # [N] or None
    M,
    N,
    out_stride,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RASTER: tl.constexpr,
    PART_M: tl.constexpr,
    PART_N: tl.constexpr,
):
    gdc_launch_dependents()
    n = tl.program_id(0) * PART_N
    m = tl.program_id(1) * PART_M
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, ROWS)
    block_m, block_n = m // BLOCK_M, n // ROWS
    band = block_m // RASTER
    tall = tl.minimum(blocks_m - band * RASTER, RASTER)
    tile = band * RASTER * blocks_n + block_n * tall + block_m % RASTER
    at = tl.arange(0, PART_N * PART_M)
    base = parts_ptr + tile.to(tl.int64) * (SPLIT * ROWS * BLOCK_M) + n % ROWS * BLOCK_M + m % BLOCK_M * PART_N
    written = m + at // (8 * PART_N) * 8 < M
    gdc_wait()
    acc = tl.zeros((PART_N * PART_M,), tl.float32)
    for i in tl.static_range(SPLIT):
        acc += tl.load(base + i * (ROWS * BLOCK_M) + at, mask=written, other=0.0)
    # [8 rows of x, warp, r, c, row half, d] are the registers of wgmma: n = 16 warp + 8 half + r, m = 8 (..) + 2 c + d.
    acc = tl.permute(tl.reshape(acc, (PART_M // 8, 4, 8, 4, 2, 2)), (0, 3, 5, 1, 4, 2))
    acc = tl.reshape(acc, (PART_M, PART_N))
    column, row = n + tl.arange(0, PART_N), m + tl.arange(0, PART_M)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


def addition(
    out: Tensor, parts: Tensor, bias: Tensor | None, m: int, n: int, split: int, rows: int, block_m: int
) -> Launch:
    """The launch of out [M, N] = the sum over `split` parts, each [rows, block_m] fp32 a unit of work, + bias."""
    part_m = min(PART_M, block_m & -block_m)
    return Launch(
        fn=_add_parts,
        grid=(triton.cdiv(n, PART_N), triton.cdiv(m, part_m)),
        args={"out_ptr": out, "parts_ptr": parts, "bias_ptr": bias, "M": m, "N": n, "out_stride": out.stride(0)},
        constants={
            "SPLIT": split,
            "ROWS": rows,
            "BLOCK_M": block_m,
            "RASTER": RASTER_M.value,
            "PART_M": part_m,
            "PART_N": PART_N,
        },
        options={"num_warps": 4, "launch_pdl": True},
    )
