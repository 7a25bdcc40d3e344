"""Two small kernels that tests of codegen compile: a Triton matmul over 4-bit codes, and a Gluon row sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from w4a16.kernels._launch import Launch


@triton.jit(do_not_specialize=["M"])
def _toy_matmul(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N, K//8] int32, sequential nibbles
    M,
    N,
    K,
    stride_codes,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=m[:, None] < M, other=0.0)
        words = tl.load(codes_ptr + n[None, :] * stride_codes + k[:, None] // 8)
        codes = (words >> (k[:, None] % 8 * 4)) & 15
        acc = tl.dot(x, (codes - 8).to(x.dtype), acc)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=m[:, None] < M)


@gluon.jit
def _toy_row_sum(out_ptr, x_ptr, K, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    offsets = gl.arange(0, BLOCK, LAYOUT)
    total = gl.zeros([BLOCK], gl.float32, LAYOUT)
    for start in range(0, K, BLOCK):
        total += gl.load(x_ptr + start + offsets).to(gl.float32)
    gl.store(out_ptr + offsets, total)


def toy_matmul(
    *,
    m: int = 64,
    n: int = 256,
    k: int = 512,
    stride: int | None = None,
    act: torch.dtype = torch.float16,
    blocks: tuple[int, int, int] = (32, 64, 32),
    warps: int = 4,
) -> Launch:
    stride = k // 8 if stride is None else stride
    return Launch(
        fn=_toy_matmul,
        grid=(-(-m // blocks[0]), n // blocks[1]),
        args={
            "out_ptr": torch.empty((m, n), dtype=act, device="meta"),
            "x_ptr": torch.empty((m, k), dtype=act, device="meta"),
            "codes_ptr": torch.empty((n, stride), dtype=torch.int32, device="meta"),
            "M": m,
            "N": n,
            "K": k,
            "stride_codes": stride,
        },
        constants=dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True)),
        options={"num_warps": warps, "num_stages": 1},
    )


def toy_row_sum(k: int = 4096, lanes: int = 32) -> Launch:
    return Launch(
        fn=_toy_row_sum,
        grid=(1,),
        args={
            "out_ptr": torch.empty(512, dtype=torch.float32, device="meta"),
            "x_ptr": torch.empty(k, dtype=torch.float16, device="meta"),
            "K": k,
        },
        constants={"BLOCK": 512, "LAYOUT": gl.BlockedLayout([4], [lanes], [128 // lanes], [0])},
        options={"num_warps": 128 // lanes},
    )
