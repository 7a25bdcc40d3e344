"""Producer and consumer waves on gfx11: half of a program's waves unpack weights into LDS, the other half multiplies.

Gluon's warp_specialize does not compile for gfx11, so a program branches on the number of its wave. A tensor belongs to
all waves still: its layout gives both halves the same part of it, and the half that computes it is the one that comes
by. Both meet at s_barrier, which counts waves, wherever they stand.

gfx11 gives every wave of a program the same registers. Consumers need fewer than waves that also unpack, so that twice
the waves fit, and what a producer waits for is no consumer's wait.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import cdna3, rdna3
from triton.language import core

from ..compat import halved_wmma_layout, workgroup_barrier
from ._gfx11 import dequantized, held


@core.extern
def _thread(_semantic=None):
    symbols = {(): ("llvm.amdgcn.workitem.id.x", core.int32)}
    return core.extern_elementwise("", "", [], symbols, is_pure=True, _semantic=_semantic)


@core.extern
def _of_first_lane(value, _semantic=None):
    """Scalar to LLVM as well: what it decides is a branch, and no mask."""
    symbols = {(core.int32,): ("llvm.amdgcn.readfirstlane.i32", core.int32)}
    return core.extern_elementwise("", "", [value], symbols, is_pure=True, _semantic=_semantic)


@gluon.jit
def produces(CONSUMERS: gl.constexpr):
    """Whether this wave is one of those behind the first CONSUMERS."""
    return _of_first_lane(_thread()) >= 32 * CONSUMERS


@triton.constexpr_function
def halved_rows_layout(rows, columns, most, warps):
    """_gfx11.rows_layout over half of 2 * warps waves; both halves hold the same."""
    each = max(1, min(most, rows * columns // (32 * warps), columns))
    across = min(32, columns // each)
    down = 32 // across
    return gl.DistributedLinearLayout(
        reg_bases=[[0, c] for c in _doubled(1, each)]
        + [[r, 0] for r in _doubled(down * warps, rows)]
        + [[0, c] for c in _doubled(each * across, columns)],
        lane_bases=[[0, c] for c in _doubled(each, each * across)] + [[r, 0] for r in _doubled(1, down)],
        warp_bases=[*([r, 0] for r in _doubled(down, down * warps)), [0, 0]],
        block_bases=[],
        shape=[rows, columns],
    )


@triton.constexpr_function
def _doubled(start, end):
    """start, 2 * start, ... below `end`."""
    return [start << bit for bit in range((end // start).bit_length() - 1)]


@triton.constexpr_function
def _ring_layout(block_k):
    """_gfx11.ring_layout of [1, rows, block_k]."""
    rows_a_line = max(1, 64 // block_k)
    return gl.SwizzledSharedLayout(8, rows_a_line, min(block_k // 8, 8 // rows_a_line), [2, 1, 0])


@gluon.jit
def ring(DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Two blocks of LDS: one is read while the other is filled."""
    LAYOUT: gl.constexpr = _ring_layout(COLUMNS)
    return (
        gl.allocate_shared_memory(DTYPE, [1, ROWS, COLUMNS], LAYOUT),
        gl.allocate_shared_memory(DTYPE, [1, ROWS, COLUMNS], LAYOUT),
    )


@gluon.jit
def _fill(block, values):
    block.store(gl.reshape(values, (1, values.shape[0], values.shape[1])))


@gluon.jit
def produce(
    x_ring,
    w_ring,
    x_base,
    x_at,  # [BLOCK_M, BLOCK_K] int32
    codes_base,
    codes_at,  # [BLOCK_N, BLOCK_K//8] int32
    scales_base,
    scales_at,  # [BLOCK_N] int32
    zeros_base,  # or None: every zero point is 8
    zeros_at,  # [BLOCK_N] int32
    zero_shift,  # [BLOCK_N] int32
    K,
    GROUP: gl.constexpr,
    TO_EVEN: gl.constexpr,
):
    """Fills a block of x and of W a step, the one that the next step reads; asks for what lies two steps ahead."""
    DTYPE: gl.constexpr = x_base.dtype.element_ty
    HAS_ZEROS: gl.constexpr = zeros_base is not None
    BLOCK_K: gl.constexpr = x_at.shape[1]
    WORDS: gl.constexpr = BLOCK_K // 8
    GROUP_STEPS: gl.constexpr = GROUP // BLOCK_K
    STEPS: gl.constexpr = max(2, GROUP_STEPS)

    scale = cdna3.buffer_load(scales_base, scales_at)
    if HAS_ZEROS:
        zero = (cdna3.buffer_load(zeros_base, zeros_at) >> zero_shift) & 0xF
    else:
        zero = gl.full((scales_at.shape[0],), 8, gl.int32, scales_at.type.layout)
    _fill(x_ring[0], cdna3.buffer_load(x_base, x_at))
    words = cdna3.buffer_load(codes_base, codes_at)
    _fill(w_ring[0], dequantized(words, scale, zero, DTYPE, "magic", TO_EVEN))
    x = cdna3.buffer_load(x_base + BLOCK_K, x_at)
    words = cdna3.buffer_load(codes_base + WORDS, codes_at)
    workgroup_barrier()
    steps = K.to(gl.uint32) // BLOCK_K
    for trip in range((steps // STEPS).to(gl.int32)):
        for step in gl.static_range(STEPS):
            now = (trip * STEPS + step).to(gl.uint32)
            ahead = gl.minimum(now + 2, steps - 1)
            next_x = cdna3.buffer_load(x_base + ahead * BLOCK_K, x_at)
            next_words = cdna3.buffer_load(codes_base + ahead * WORDS, codes_at)
            if step % GROUP_STEPS == 0:
                group_next = gl.minimum(now // GROUP_STEPS + 1, (steps - 1) // GROUP_STEPS)
                next_scale = cdna3.buffer_load(scales_base + group_next, scales_at)
                if HAS_ZEROS:
                    next_zero = cdna3.buffer_load(zeros_base + group_next, zeros_at)
            words = held(words)
            if (step + 1) % GROUP_STEPS == 0:
                scale = next_scale
                if HAS_ZEROS:
                    zero = (held(next_zero) >> zero_shift) & 0xF
            _fill(x_ring[(step + 1) % 2], x)
            _fill(w_ring[(step + 1) % 2], dequantized(words, scale, zero, DTYPE, "magic", TO_EVEN))
            x, words = next_x, next_words
            workgroup_barrier()


@gluon.jit
def consume(
    x_ring, w_ring, K, BLOCK_K: gl.constexpr, GROUP: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr
):
    """fp32 [BLOCK_M, BLOCK_N] of the blocks that the producers fill."""
    SUMS: gl.constexpr = halved_wmma_layout(WARPS_M, WARPS_N)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 16)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 16)
    BLOCK_M: gl.constexpr = x_ring[0].shape[1]
    BLOCK_N: gl.constexpr = w_ring[0].shape[1]
    STEPS: gl.constexpr = max(2, GROUP // BLOCK_K)

    acc = gl.zeros((1, BLOCK_M, BLOCK_N), gl.float32, SUMS)
    workgroup_barrier()
    for _ in range((K.to(gl.uint32) // BLOCK_K // STEPS).to(gl.int32)):
        for step in gl.static_range(STEPS):
            x = x_ring[step % 2].load(LEFT)
            w = w_ring[step % 2].permute((0, 2, 1)).load(RIGHT)
            acc = rdna3.wmma(x, w, acc)
            workgroup_barrier()
    return gl.reshape(acc, (BLOCK_M, BLOCK_N))
