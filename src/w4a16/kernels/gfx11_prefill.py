"""gfx11_prefill: x [M, K] @ W [N, K]^T by the WMMA instructions of RDNA3 and RDNA3.5, driven by hand."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..compat import wmma_layout
from ..layouts import PackedWeight
from ..tuning.gfx11_tiles import MOST_SUMS, Gfx11Tile, paired_block_k
from ._gfx11 import accumulate, block_of_program, blocks_of, code_words_layout, group_sums, rows_layout, scales_layout
from ._gfx11_producers import consume, halved_rows_layout, produce, produces, ring
from ._launch import Launch, runs
from ._skinny import first_stride, pointers, strides

# Blocks of M that walk over N together. The 40 programs that run at once read the fewest bytes of x and W a step at 2
# to 4 of them (256 and 128 rows each): x has four times the bits of W.
RASTER_M = 4


@gluon.jit(do_not_specialize=["M"])
def _gfx11_prefill(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N, K//8] int32, layout SKINNY
    scales_ptr,  # [N, K//G]
    zeros_ptr,  # [ceil(N/8), K//G] int32, or None: every zero point is 8
    bias_ptr,  # [N] or None
    sums_ptr,  # [K//G, rows of whole blocks] fp32, of group_sum alone
    M,
    N,
    K,
    out_stride,
    x_stride,
    codes_stride,
    scales_stride,
    zeros_stride,
    sums_stride,
    GROUP: gl.constexpr,
    DEQUANT: gl.constexpr,
    TO_EVEN: gl.constexpr,
    LDS_FEED: gl.constexpr,
    PRODUCERS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WARPS_M: gl.constexpr,
    WARPS_N: gl.constexpr,
    RASTER: gl.constexpr,
):
    ON_SUM: gl.constexpr = DEQUANT == "group_sum"
    WARPS: gl.constexpr = WARPS_M * WARPS_N
    X: gl.constexpr = (halved_rows_layout if PRODUCERS else rows_layout)(BLOCK_M, BLOCK_K, 8, WARPS)
    CODES: gl.constexpr = (
        halved_rows_layout(BLOCK_N, BLOCK_K // 8, 4, WARPS)
        if PRODUCERS
        else code_words_layout(BLOCK_N, BLOCK_K, WARPS_M, WARPS_N, LDS_FEED)
    )
    SCALES: gl.constexpr = (
        gl.SliceLayout(1, CODES) if PRODUCERS else scales_layout(BLOCK_N, BLOCK_K, WARPS_M, WARPS_N, LDS_FEED, ON_SUM)
    )

    block_m, block_n = block_of_program(blocks_of(M, BLOCK_M), blocks_of(N, BLOCK_N), RASTER)
    m0, n0 = block_m * BLOCK_M, block_n * BLOCK_N

    # Rows past the end repeat the last one.
    x_rows = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(1, X)), M - 1 - m0)
    x_at = x_rows[:, None] * x_stride + gl.arange(0, BLOCK_K, gl.SliceLayout(0, X))[None, :]
    code_rows = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, CODES)), N - 1 - n0)
    codes_at = code_rows[:, None] * codes_stride + gl.arange(0, BLOCK_K // 8, gl.SliceLayout(0, CODES))[None, :]
    n = n0 + gl.minimum(gl.arange(0, BLOCK_N, SCALES), N - 1 - n0)
    zeros_at, zero_shift = (n >> 3) * zeros_stride, (n & 7) * 4
    x_base = x_ptr + m0.to(gl.int64) * x_stride
    codes_base = codes_ptr + n0.to(gl.int64) * codes_stride
    scales_base, scales_at = scales_ptr + n0.to(gl.int64) * scales_stride, (n - n0) * scales_stride
    if PRODUCERS:
        x_ring = ring(x_ptr.dtype.element_ty, BLOCK_M, BLOCK_K)
        w_ring = ring(x_ptr.dtype.element_ty, BLOCK_N, BLOCK_K)
        if produces(WARPS):
            produce(
                x_ring,
                w_ring,
                x_base,
                x_at,
                codes_base,
                codes_at,
                scales_base,
                scales_at,
                zeros_ptr,
                zeros_at,
                zero_shift,
                K,
                GROUP,
                TO_EVEN,
            )
        else:
            acc = consume(x_ring, w_ring, K, BLOCK_K, GROUP, WARPS_M, WARPS_N)
            _store(out_ptr, acc, bias_ptr, m0, n0, M, N, out_stride)
    else:
        sums_base = sums_ptr
        if ON_SUM:
            sums_base += m0
        acc = accumulate(
            x_base,
            x_at,
            codes_base,
            codes_at,
            scales_base,
            scales_at,
            zeros_ptr,
            zeros_at,
            zero_shift,
            sums_base,
            gl.arange(0, BLOCK_M, gl.SliceLayout(1, wmma_layout(WARPS_M, WARPS_N))),
            sums_stride,
            K,
            GROUP,
            DEQUANT,
            TO_EVEN,
            LDS_FEED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            WARPS_M,
            WARPS_N,
        )
        _store(out_ptr, acc, bias_ptr, m0, n0, M, N, out_stride)


@gluon.jit
def _store(out_ptr, acc, bias_ptr, m0, n0, M, N, out_stride):
    """acc, and the bias, to the rows and columns from m0 and n0 on that exist."""
    SUMS: gl.constexpr = acc.type.layout
    columns = n0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, SUMS))
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
    rows = m0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, SUMS))
    at = out_ptr + rows[:, None].to(gl.int64) * out_stride + columns[None, :]
    gl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


def plan(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: Gfx11Tile) -> tuple[Launch, ...]:
    """The launches of out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    m, n, k, group = x.shape[0], weight.n, weight.k, weight.group
    launches: tuple[Launch, ...] = ()
    sums: Tensor | None = None
    if tile.dequant == "group_sum":
        sums, launch = group_sums(x, group, tile.block_m)
        launches = (launch,)
    args = {
        **pointers(out, x, weight),
        "bias_ptr": bias,
        "sums_ptr": sums,
        "M": m,
        "N": n,
        "K": k,
        **strides(out, x, weight),
        "sums_stride": first_stride(sums),
    }
    constants = {
        "GROUP": group,
        "DEQUANT": tile.dequant,
        "TO_EVEN": tile.rounding == "even",
        "LDS_FEED": tile.feed == "lds",
        "PRODUCERS": tile.feed == "producers",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": paired_block_k(tile.block_k, k, group),
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "RASTER": RASTER_M,
    }
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    options = {"num_warps": tile.warps}
    if tile.feed == "producers" and tile.sums == MOST_SUMS:
        options["waves_per_eu"] = tile.warps // 2  # two programs on four SIMDs; Triton 3.7 lets only one fit otherwise
    return (*launches, Launch(fn=_gfx11_prefill, grid=grid, args=args, constants=constants, options=options))


gfx11_prefill = runs(plan)
