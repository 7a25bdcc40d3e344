"""cpu_prefill: a block of W is dequantised once into the L2 cache and meets every row of x from there. Needs numba.

A task works on chunks of BLOCK_M x block_n of the output until none is left; its threads share the chunk counter.
Neither threads nor chunks change the result. The lanes of a vector are rows of W, so a tile's sums need no reduction.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..layouts import PackedWeight
from ..tuning.tiles import CpuTile
from . import _cpu_jit as jit
from ._cpu_jit import F32, I32, I64, KINDS, LANES, SCALE_BYTES, SHIFTS, const, field, get, load, offset, take
from ._cpu_threads import finish, out_scratch, rows_a_chunk, run, threads_for

TILE_M, TILE_N = 6, 2 * LANES  # 12 vectors of sums, 2 of W, one of x: 15 of the 16 registers of AVX2
BLOCK_M = 40 * TILE_M  # rows of x before W is dequantised again
COLUMNS = 256  # of x and W in a tile: both fit the L1 cache


def cpu_prefill(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: CpuTile) -> None:
    """out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order. The group must be a multiple of 8."""
    m, n, k = x.shape[0], weight.n, weight.k
    threads = threads_for(m, n, k)
    acc = out_scratch(out, bias, TILE_M, TILE_N)
    values = x.to(torch.float32)
    block_n = rows_a_chunk(n, tile.block_n, threads, TILE_N)
    block_k = jit.columns_at_a_time(COLUMNS, weight.group, k)
    scratch = values.new_empty(threads * block_n * block_k)
    args = jit.task_args(
        weight=weight,
        out=acc,
        m=m,
        x=values.data_ptr(),
        x_row=4 * values.stride(0),
        block_m=BLOCK_M,
        block_n=block_n,
        block_k=block_k,
        scratch=scratch.data_ptr(),
    )
    run(_gemm(KINDS[weight.act]).address, args, threads)
    finish(out, acc, bias)


@functools.cache
def _gemm(kind: int) -> Any:
    def cpu_prefill_gemm(args):
        block_m, block_n, block_k = get(args, "block_m"), get(args, "block_n"), get(args, "block_k")
        m_end, n_end, k_end, group = get(args, "m"), get(args, "n"), get(args, "k"), get(args, "group")
        w = get(args, "scratch") + take(args, "next_worker") * 4 * block_n * block_k
        across = (n_end + block_n - 1) // block_n
        chunks = across * ((m_end + block_m - 1) // block_m)
        chunk = take(args, "next_chunk")
        while chunk < chunks:
            m0, n0 = chunk // across * block_m, chunk % across * block_n
            m1, n1 = min(m0 + block_m, m_end), min(n0 + block_n, n_end)
            for k in range(0, k_end, block_k):
                columns = min(block_k, k_end - k)
                shared = min(group, columns)
                for n in range(n0, n1, TILE_N):
                    to = w + (n - n0) * 4 * block_k
                    _dequantize_rows(kind, args, n, k, k // group, shared, columns // shared, to)
                for m in range(m0, m1, TILE_M):
                    for n in range(n0, n1, TILE_N):
                        _gemm_tile(args, m, n, k, columns, w + (n - n0) * 4 * block_k)
            chunk = take(args, "next_chunk")

    return jit.compile_task(cpu_prefill_gemm)


@intrinsic(prefer_literal=True)
def _dequantize_rows(_typing, kind, args, n, k, g, shared, groups, to):
    """TILE_N rows of W over `groups` groups of `shared` columns, from column k in group g, fp32 [columns, TILE_N]."""
    kind_ = kind.literal_value

    def codegen(context, b, _signature, values):
        args, n, k, g, shared, groups, to = values[1:]
        rows = [jit.weight_at(b, args, row, k, g, kind_) for row in jit.clamped(b, n, TILE_N, field(b, args, "n"))]
        words_a_group = b.lshr(shared, const(I64, 3))
        with cgutils.for_range(b, groups) as group:
            scales_at = [offset(b, scale, group.index, SCALE_BYTES[kind_]) for _, scale, _ in rows]
            zeros_at = [offset(b, zero, group.index, field(b, args, "zero_step")) for _, _, zero in rows]
            scales = jit.scale_and_shift_of_rows(b, scales_at, zeros_at, kind_)
            with cgutils.for_range(b, words_a_group) as inner:
                at = b.add(b.mul(group.index, words_a_group), inner.index)
                words = jit.gather(b, [offset(b, row, at, 4) for row, _, _ in rows], I32)
                for i, shift in enumerate(SHIFTS):
                    q = b.and_(b.lshr(words, const(words.type, shift)), const(words.type, 15))
                    w = jit.fma(b, b.sitofp(q, ir.VectorType(F32, TILE_N)), *scales)
                    jit.store(b, w, b.add(offset(b, to, at, 32 * TILE_N), const(I64, 4 * TILE_N * i)))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 7), codegen


@intrinsic
def _gemm_tile(_typing, args, m, n, k, columns, w):
    """out[m : m + TILE_M, n : n + TILE_N] += x[m, k : k + columns] @ w, the dequantised [columns, TILE_N]."""

    def codegen(context, b, _signature, values):
        args, m, n, k, columns, w = values
        floats_t = ir.VectorType(F32, LANES)
        x = offset(b, field(b, args, "x"), k, 4)
        x_rows = [offset(b, x, row, field(b, args, "x_row")) for row in jit.clamped(b, m, TILE_M, field(b, args, "m"))]
        sums = jit.accumulators(b, TILE_M, TILE_N // LANES, LANES)
        with cgutils.for_range(b, columns) as column:
            w_at = offset(b, w, column.index, 4 * TILE_N)
            ws = [load(b, b.add(w_at, const(I64, 4 * LANES * j)), floats_t) for j in range(TILE_N // LANES)]
            for i, row in enumerate(x_rows):
                value = jit.spread(b, load(b, offset(b, row, column.index, 4), ir.VectorType(F32, 1)), LANES)
                for j, w_values in enumerate(ws):
                    jit.add_product(b, sums[i, j], w_values, value)
        first_block = b.icmp_signed("==", k, const(I64, 0))
        for (i, j), slot in sums.items():
            at = jit.out_at(b, args, b.add(m, const(I64, i)), b.add(n, const(I64, LANES * j)))
            before = b.select(first_block, const(floats_t, 0.0), load(b, at, floats_t))
            jit.store(b, b.fadd(before, b.load(slot)), at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen
