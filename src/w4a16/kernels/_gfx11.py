"""What the Gluon kernels of gfx11 share: layouts of WMMA operands, codes to 16-bit floats, the loop over K.

x goes through two blocks of LDS in turn: one is read while the other is filled, with one barrier a step. W takes one of
two ways: "registers", where each lane loads the words of exactly its operand and unpacks them, without LDS or a barrier
for W; or "lds", where every weight is unpacked once a program and every wave reads what it multiplies from LDS.

WMMA 16x16x16 takes from each lane one row (of x) or column (of W^T) of 16 values along K, the same in both halves of a
wave; of the sums, lane l holds column l % 16 and the rows l // 16, l // 16 + 2, ... . So two words of codes of one row
of W are one lane's operand, and a vector along N costs one register for 16 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import cdna3, rdna3

from ..compat import wmma_layout, workgroup_barrier
from ._launch import Launch

SUM_BLOCK_M = 32


@triton.constexpr_function
def _powers(end):
    """1, 2, 4, ... below `end`."""
    return [1 << bit for bit in range(end.bit_length() - 1)]


@triton.constexpr_function
def operand_words_layout(block_n, words, warps_m, warps_n):
    """Words [block_n, words] as the lanes of WMMA's second operand hold their codes: K in registers, warps along N."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, w] for w in _powers(words)] + [[16 * warps_n * n, 0] for n in _powers(block_n // 16 // warps_n)],
        lane_bases=[[1, 0], [2, 0], [4, 0], [8, 0], [0, 0]],
        warp_bases=[[16 * n, 0] for n in _powers(warps_n)] + [[0, 0]] * len(_powers(warps_m)),
        block_bases=[],
        shape=[block_n, words],
    )


@triton.constexpr_function
def rows_layout(rows, columns, most, warps):
    """[rows, columns] spread over the program, up to `most` columns a lane, neighbours along a row first."""
    each = max(1, min(most, rows * columns // (32 * warps), columns))
    across = min(32, columns // each)
    return gl.BlockedLayout([1, each], [32 // across, across], [warps, 1], [1, 0])


@triton.constexpr_function
def code_words_layout(block_n, block_k, warps_m, warps_n, lds_feed):
    """The words of a step: spread over the program on their way to LDS, else those of each lane's operand."""
    words = block_k // 8
    if lds_feed:
        return rows_layout(block_n, words, 4, warps_m * warps_n)
    return operand_words_layout(block_n, words, warps_m, warps_n)


@triton.constexpr_function
def scales_layout(block_n, block_k, warps_m, warps_n, lds_feed, on_sum):
    """Where scales and zero points are wanted: on the columns of the sums, or on the rows of the words."""
    if on_sum:
        return gl.SliceLayout(0, wmma_layout(warps_m, warps_n))
    return gl.SliceLayout(1, code_words_layout(block_n, block_k, warps_m, warps_n, lds_feed))


@triton.constexpr_function
def ring_layout(block_k):
    """[rows, block_k] 16-bit values in LDS: eight lanes that read or write 16 bytes of neighbouring rows meet no bank
    twice."""
    rows_a_line = max(1, 64 // block_k)  # of 128 bytes: every bank once
    chunks = block_k // 8
    return gl.SwizzledSharedLayout(8, rows_a_line, min(chunks, 8 // rows_a_line), [1, 0])


@gluon.jit
def block_of_program(blocks_m, blocks_n, RASTER: gl.constexpr):
    """The blocks of M and N of a program: RASTER blocks of M walk over N together; unsigned, as that divides faster."""
    program, across = gl.program_id(0).to(gl.uint32), blocks_n * RASTER
    band = program // across * RASTER
    inside, tall = program % across, gl.minimum(blocks_m - band, RASTER)
    return (band + inside % tall).to(gl.int32), (inside // tall).to(gl.int32)


@gluon.jit
def blocks_of(size, BLOCK: gl.constexpr):
    """Blocks that cover `size`, unsigned."""
    return (size.to(gl.uint32) + (BLOCK - 1)) // BLOCK


@gluon.jit
def held(words):
    """`words` (int32), unchanged, by an empty instruction that memory operations do not cross.

    LLVM would sink a prefetch from global memory to its use, and wait for it there.
    """
    return gl.inline_asm_elementwise("", "=v,0", [words], gl.int32, False, 1)


@gluon.jit
def magic_value(DTYPE: gl.constexpr):
    """What MAGIC stands for: 1024 in fp16, 128 in bf16."""
    return 1024 if DTYPE.is_fp16() else 128


@gluon.jit
def _masked(words, DTYPE: gl.constexpr):
    """The codes in the low nibbles of a word's halves as two floats MAGIC + code."""
    return (words & 0x000F000F) | (0x64006400 if DTYPE.is_fp16() else 0x43004300)


@gluon.jit
def _twice(bits):
    """16-bit patterns, each in both halves of a word."""
    return bits | (bits << 16)


@gluon.jit
def _scaled_fp16(pair, scale, zero):
    """(MAGIC + code - (MAGIC + zero)) * scale of both halves; the product is rounded to nearest even."""
    offset = _twice(zero | 0xE400)[:, None]  # -(1024 + zero)
    scales = _twice(scale.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF)[:, None]
    pair = gl.inline_asm_elementwise("v_pk_add_f16 $0, $1, $2", "=v,v,v", [pair, offset], gl.int32, True, 1)
    return gl.inline_asm_elementwise("v_pk_mul_f16 $0, $1, $2", "=v,v,v", [pair, scales], gl.int32, True, 1)


@gluon.jit
def _rounded(value, TO_EVEN: gl.constexpr):
    """fp32 as bits whose upper half is the bf16: to nearest even, or cut. No weight is NaN."""
    bits = value.to(gl.int32, bitcast=True)
    if TO_EVEN:
        odd = gl.inline_asm_elementwise("v_bfe_u32 $0, $1, 16, 1", "=v,v", [bits], gl.int32, True, 1)
        bits += odd + 0x7FFF
    return bits


@gluon.jit
def _scaled_bf16(pair, scale, zero, TO_EVEN: gl.constexpr):
    """(MAGIC + code - (MAGIC + zero)) * scale of both halves, exact in fp32, then rounded or cut to bf16.

    Written as instructions where Triton 3.9 takes two or three for LLVM's one.
    """
    offset = (zero + 128).to(gl.float32)[:, None]
    scales = scale.to(gl.float32)[:, None]
    low = _rounded(((pair << 16).to(gl.float32, bitcast=True) - offset) * scales, TO_EVEN)
    high = _rounded(((pair & -65536).to(gl.float32, bitcast=True) - offset) * scales, TO_EVEN)
    return gl.inline_asm_elementwise("v_perm_b32 $0, $1, $2, 0x7060302", "=v,v,v", [high, low], gl.int32, True, 1)


@gluon.jit
def _weights(pair, scale, zero, DTYPE: gl.constexpr, DEQUANT: gl.constexpr, TO_EVEN: gl.constexpr):
    if DEQUANT == "magic" and DTYPE.is_fp16():
        pair = _scaled_fp16(pair, scale, zero)
    elif DEQUANT == "magic":
        pair = _scaled_bf16(pair, scale, zero, TO_EVEN)
    return pair


@gluon.jit
def dequantized(words, scale, zero, DTYPE: gl.constexpr, DEQUANT: gl.constexpr, TO_EVEN: gl.constexpr):
    """[N, 8 K] 16-bit floats of words [N, K]; scale and zero (int32) [N] lie along their rows.

    magic: (code - zero) * scale. group_sum: MAGIC + code, whose offset and scale the fp32 sum over the group meets.
    """
    ROWS: gl.constexpr = words.shape[0]
    COLUMNS: gl.constexpr = words.shape[1] * 8
    p0 = _weights(_masked(words, DTYPE), scale, zero, DTYPE, DEQUANT, TO_EVEN)
    p1 = _weights(_masked(words >> 4, DTYPE), scale, zero, DTYPE, DEQUANT, TO_EVEN)
    p2 = _weights(_masked(words >> 8, DTYPE), scale, zero, DTYPE, DEQUANT, TO_EVEN)
    p3 = _weights(_masked(words >> 12, DTYPE), scale, zero, DTYPE, DEQUANT, TO_EVEN)
    pairs = gl.join(gl.join(p0, p2), gl.join(p1, p3))
    low = pairs.to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.reshape(gl.join(low, high), (ROWS, COLUMNS))


@gluon.jit
def accumulate(
    x_base,
    x_at,  # [BLOCK_M, BLOCK_K] int32
    codes_base,
    codes_at,  # [BLOCK_N, BLOCK_K//8] int32
    scales_base,
    scales_at,  # [BLOCK_N] int32
    zeros_base,  # or None: every zero point is 8
    zeros_at,  # [BLOCK_N] int32
    zero_shift,  # [BLOCK_N] int32
    sums_base,  # of group_sum alone
    sums_at,  # [BLOCK_M] int32
    sums_stride,
    K,
    GROUP: gl.constexpr,
    DEQUANT: gl.constexpr,
    TO_EVEN: gl.constexpr,
    LDS_FEED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WARPS_M: gl.constexpr,
    WARPS_N: gl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N] of rows of x and rows of W: bases move along K, the offsets of a tile stay."""
    DTYPE: gl.constexpr = x_base.dtype.element_ty
    ON_SUM: gl.constexpr = DEQUANT == "group_sum"
    HAS_ZEROS: gl.constexpr = zeros_base is not None
    SUMS: gl.constexpr = wmma_layout(WARPS_M, WARPS_N)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 16)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 16)
    RING: gl.constexpr = ring_layout(BLOCK_K)
    WORDS: gl.constexpr = BLOCK_K // 8
    GROUP_STEPS: gl.constexpr = GROUP // BLOCK_K
    STEPS: gl.constexpr = max(2, GROUP_STEPS)
    CODES_AHEAD: gl.constexpr = 2 if LDS_FEED else 1

    x_even = gl.allocate_shared_memory(DTYPE, [BLOCK_M, BLOCK_K], RING)
    x_odd = gl.allocate_shared_memory(DTYPE, [BLOCK_M, BLOCK_K], RING)
    scale = cdna3.buffer_load(scales_base, scales_at)
    if HAS_ZEROS:
        zero = (cdna3.buffer_load(zeros_base, zeros_at) >> zero_shift) & 0xF
    else:
        zero = gl.full((BLOCK_N,), 8, gl.int32, scales_at.type.layout)
    x_even.store(cdna3.buffer_load(x_base, x_at))
    words = cdna3.buffer_load(codes_base, codes_at)
    if LDS_FEED:
        w_even = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_K], RING)
        w_odd = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_K], RING)
        w_even.store(dequantized(words, scale, zero, DTYPE, DEQUANT, TO_EVEN))
        words = cdna3.buffer_load(codes_base + WORDS, codes_at)
    workgroup_barrier()
    steps = K.to(gl.uint32) // BLOCK_K  # unsigned throughout: no sign to extend or to divide around
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, SUMS)
    total = acc
    for trip in range((steps // STEPS).to(gl.int32)):
        for step in gl.static_range(STEPS):
            now = (trip * STEPS + step).to(gl.uint32)
            x_next, codes_next = gl.minimum(now + 1, steps - 1), gl.minimum(now + CODES_AHEAD, steps - 1)
            next_x = cdna3.buffer_load(x_base + x_next * BLOCK_K, x_at)
            next_words = cdna3.buffer_load(codes_base + codes_next * WORDS, codes_at)
            if step % GROUP_STEPS == 0:
                group = now // GROUP_STEPS
                group_next = gl.minimum(group + 1, (steps - 1) // GROUP_STEPS)
                next_scale = cdna3.buffer_load(scales_base + group_next, scales_at)
                if HAS_ZEROS:
                    next_zero = cdna3.buffer_load(zeros_base + group_next, zeros_at)
                if ON_SUM:
                    sums = cdna3.buffer_load(sums_base + group.to(gl.int64) * sums_stride, sums_at)
                    offset = -(zero + magic_value(DTYPE)).to(gl.float32)
                    total = sums[:, None] * offset[None, :]
            words = held(words)
            x = (x_even if step % 2 == 0 else x_odd).load(LEFT)
            if LDS_FEED:
                w = (w_even if step % 2 == 0 else w_odd).permute((1, 0)).load(RIGHT)
            else:
                w = dequantized(words, scale, zero, DTYPE, DEQUANT, TO_EVEN)
                w = gl.convert_layout(gl.permute(w, (1, 0)), RIGHT)
            if ON_SUM:
                total = rdna3.wmma(x, w, total)
            else:
                acc = rdna3.wmma(x, w, acc)
            if (step + 1) % GROUP_STEPS == 0:
                if ON_SUM:
                    acc += total * scale.to(gl.float32)[None, :]
                scale = next_scale
                if HAS_ZEROS:
                    zero = (held(next_zero) >> zero_shift) & 0xF
            (x_odd if step % 2 == 0 else x_even).store(next_x)
            if LDS_FEED:
                next_w = dequantized(words, scale, zero, DTYPE, DEQUANT, TO_EVEN)
                (w_odd if step % 2 == 0 else w_even).store(next_w)
            words = next_words
            # Here, not where LDS is read next: a barrier waits for every load, and the next ones come after this.
            workgroup_barrier()
    return acc


@triton.jit(do_not_specialize=["M"])
def _gfx11_sums(
    sums_ptr,  # [K//G, rows of whole blocks] fp32
    x_ptr,  # [M, K]
    M,
    x_stride,
    sums_stride,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sum of x over each group, rows next to each other: the accumulators' lanes ask for runs of them."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    inside = tl.minimum(rows, M - 1).to(tl.int64)
    values = tl.load(x_ptr + inside[:, None] * x_stride + group * GROUP + tl.arange(0, GROUP)[None, :])
    tl.store(sums_ptr + group.to(tl.int64) * sums_stride + rows, tl.sum(values.to(tl.float32), 1), mask=rows < M)


def group_sums(x: Tensor, group: int, block_m: int) -> tuple[Tensor, Launch]:
    """A workspace [K//G, rows of whole blocks of block_m], and the launch that fills its first M columns."""
    m, k = x.shape
    sums = x.new_empty((k // group, triton.cdiv(m, block_m) * block_m), dtype=torch.float32)
    return sums, Launch(
        fn=_gfx11_sums,
        grid=(triton.cdiv(m, SUM_BLOCK_M), k // group),
        args={"sums_ptr": sums, "x_ptr": x, "M": m, "x_stride": x.stride(0), "sums_stride": sums.stride(0)},
        constants={"GROUP": group, "BLOCK_M": SUM_BLOCK_M},
        options={"num_warps": 4},
    )
