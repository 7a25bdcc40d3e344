"""cpu_decode: W from its packed words, for a few rows of x. Needs numba.

    gemv   1 row of x     q as it stands in the word, times x scaled to match: and, convert, fma for a vector of W
    tile   2 to 8 rows    a vector of W is dequantised once and meets every row of x while it is in a register

A task works on chunks of `block_n` rows of W until none is left; its threads share the chunk counter.
The result depends on neither threads nor chunks.
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

GEMV_ROWS = 4  # rows of W that share a load of x
TILE_ROWS = {2: 4, 4: 2, 8: 1}  # the same, by the rows of x
TILE_VALUES = 8192  # of x in a tile: 32 KB


def cpu_decode(*, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: CpuTile) -> None:
    """out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order. The group must be a multiple of 8."""
    m, n, k, group = x.shape[0], weight.n, weight.k, weight.group
    lanes = LANES if group % LANES == 0 else 8
    threads = threads_for(m, n, k)
    kind = KINDS[weight.act]
    run_columns = max(group, 8 * lanes)  # columns of W between two loads of scales
    if m == 1 and k % run_columns == 0 and run_columns % group == 0 and run_columns % (8 * lanes) == 0:
        tile_m, tile_n, task = 1, GEMV_ROWS, _gemv(kind, lanes, run_columns // group)
        values, sums = _for_gemv(x, lanes, run_columns)
    else:
        tile_m = next((rows for rows in TILE_ROWS if rows >= m), 8)
        tile_n, task = TILE_ROWS[tile_m], _tile(kind, lanes, tile_m)
        values = sums = _for_tiles(x, lanes, tile_m)
    acc = out_scratch(out, bias, tile_m, tile_n)
    args = jit.task_args(
        weight=weight,
        out=acc,
        m=m,
        x=values.data_ptr(),
        x_sums=sums.data_ptr(),
        block_n=rows_a_chunk(n, tile.block_n, threads, tile_n),
        block_k=jit.columns_at_a_time(TILE_VALUES // tile_m, group, k),
    )
    run(task.address, args, threads)
    finish(out, acc, bias)


@functools.cache
def _nibble_scale() -> Tensor:
    """[8, 1]: what value i of x is multiplied by, as the kernel reads its nibble in place; the top one it moves."""
    return torch.tensor([2.0**-shift if shift < 28 else 1.0 for shift in SHIFTS])[:, None]


def _for_gemv(x: Tensor, lanes: int, run_columns: int) -> tuple[Tensor, Tensor]:
    """x [1, K] as [K / (8 lanes), 8, lanes]: a vector for each nibble of a vector of words; its sums over the runs.

    A lane of a sum holds neighbouring columns, so that it stays in the group whose scale that lane gets.
    """
    words = x.to(torch.float32).view(-1, lanes, 8)
    values = words.new_empty((words.shape[0], 8, lanes))
    torch.mul(words.transpose(1, 2), _nibble_scale(), out=values)
    return values, words.view(-1, lanes, run_columns // lanes).sum(-1)


def _for_tiles(x: Tensor, lanes: int, tile_m: int) -> Tensor:
    """x [M, K] as [M / tile_m, K / lanes, tile_m, lanes] in fp32, rows of zeros added."""
    m, k = x.shape
    rows = -(-m // tile_m) * tile_m
    x = x.to(torch.float32)
    if rows > m:
        x = torch.nn.functional.pad(x, (0, 0, 0, rows - m))
    values = x.new_empty((rows // tile_m, k // lanes, tile_m, lanes))
    return values.copy_(x.view(-1, tile_m, k // lanes, lanes).transpose(1, 2))


@functools.cache
def _gemv(kind: int, lanes: int, groups: int) -> Any:
    def cpu_decode_gemv(args):
        block, end, k = get(args, "block_n"), get(args, "n"), get(args, "k")
        run_columns = get(args, "group") * groups
        first = take(args, "next_chunk") * block
        while first < end:
            for n in range(first, min(first + block, end), GEMV_ROWS):
                _gemv_rows(kind, lanes, groups, args, n, run_columns // (8 * lanes), k // run_columns)
            first = take(args, "next_chunk") * block

    return jit.compile_task(cpu_decode_gemv)


@intrinsic(prefer_literal=True)
def _gemv_rows(_typing, kind, lanes, groups, args, n, steps, runs):
    """GEMV_ROWS rows of W times the row of x. A run of steps shares scales: one group, or `groups` of them a vector."""
    kind_, lanes_, groups_ = kind.literal_value, lanes.literal_value, groups.literal_value

    def codegen(context, b, _signature, values):
        args, n, steps, runs = values[3:]
        words_t, floats_t, zero = ir.VectorType(I32, lanes_), ir.VectorType(F32, lanes_), const(I64, 0)
        rows = [
            jit.weight_at(b, args, row, zero, zero, kind_) for row in jit.clamped(b, n, GEMV_ROWS, field(b, args, "n"))
        ]
        ahead = b.mul(field(b, args, "word_row"), const(I64, GEMV_ROWS))
        totals = jit.accumulators(b, 1, GEMV_ROWS, lanes_)
        sums = jit.accumulators(b, 1, GEMV_ROWS, lanes_)
        with cgutils.for_range(b, runs) as part:
            jit.clear(b, sums)
            with cgutils.for_range(b, steps) as inner:
                step = b.add(b.mul(part.index, steps), inner.index)
                addresses = [offset(b, words, step, 4 * lanes_) for words, _, _ in rows]
                loaded = [load(b, address, words_t) for address in addresses]
                for address in addresses:
                    jit.prefetch(b, b.add(address, ahead))
                x_at = offset(b, field(b, args, "x"), step, 32 * lanes_)
                for i, shift in enumerate(SHIFTS):
                    x = load(b, b.add(x_at, const(I64, 4 * lanes_ * i)), floats_t)
                    for words, slot in zip(loaded, sums.values(), strict=True):
                        if shift == 28:  # in place it would be read as a sign
                            q = b.lshr(words, const(words_t, shift))
                        else:
                            q = b.and_(words, const(words_t, 15 << shift))
                        jit.add_product(b, slot, b.sitofp(q, floats_t), x)
            group = b.mul(part.index, const(I64, groups_))
            x_sum = load(b, offset(b, field(b, args, "x_sums"), part.index, 4 * lanes_), floats_t)
            for (_, scale, zero_point), key in zip(rows, sums, strict=True):
                scale_at = offset(b, scale, group, SCALE_BYTES[kind_])
                zero_at = offset(b, zero_point, group, field(b, args, "zero_step"))
                s, minus_zs = jit.scale_and_shift(b, scale_at, zero_at, kind_, lanes_, groups_)
                jit.add_product(b, totals[key], s, b.load(sums[key]))
                jit.add_product(b, totals[key], minus_zs, x_sum)
        jit.add_to_out(b, args, zero, n, zero, totals)
        return context.get_dummy_value()

    return types.void(kind, lanes, groups, *[types.int64] * 4), codegen


@functools.cache
def _tile(kind: int, lanes: int, tile_m: int) -> Any:
    tile_n = TILE_ROWS[tile_m]

    def cpu_decode_tile(args):
        block_n, block_k, group = get(args, "block_n"), get(args, "block_k"), get(args, "group")
        m_end, n_end, k_end = get(args, "m"), get(args, "n"), get(args, "k")
        first = take(args, "next_chunk") * block_n
        while first < n_end:
            for k in range(0, k_end, block_k):
                columns = min(block_k, k_end - k)
                shared = min(group, columns)
                for m in range(0, m_end, tile_m):
                    for n in range(first, min(first + block_n, n_end), tile_n):
                        _tile_rows(kind, lanes, tile_m, tile_n, args, m, n, k, k // group, shared, columns // shared)
            first = take(args, "next_chunk") * block_n

    return jit.compile_task(cpu_decode_tile)


@intrinsic(prefer_literal=True)
def _tile_rows(_typing, kind, lanes, tile_m, tile_n, args, m, n, k, g, shared, groups):
    """tile_n rows of W times tile_m rows of x over `groups` groups of `shared` columns, from column k in group g."""
    kind_, lanes_, m_, n_ = (ty.literal_value for ty in (kind, lanes, tile_m, tile_n))

    def codegen(context, b, _signature, values):
        args, m, n, k, g, shared, groups = values[4:]
        floats_t = ir.VectorType(F32, lanes_)
        rows = [jit.weight_at(b, args, row, k, g, kind_) for row in jit.clamped(b, n, n_, field(b, args, "n"))]
        ahead = b.mul(field(b, args, "word_row"), const(I64, n_))
        x = offset(b, field(b, args, "x"), b.add(b.mul(m, field(b, args, "k")), b.mul(k, const(I64, m_))), 4)
        sums = jit.accumulators(b, m_, n_, lanes_)
        steps = b.sdiv(shared, const(I64, lanes_))
        with cgutils.for_range(b, groups) as group:
            scales = []
            for words, scale, zero in rows:
                scale_at = offset(b, scale, group.index, SCALE_BYTES[kind_])
                zero_at = offset(b, zero, group.index, field(b, args, "zero_step"))
                scales.append(jit.scale_and_shift(b, scale_at, zero_at, kind_, lanes_))
                jit.prefetch(b, b.add(offset(b, words, b.mul(group.index, steps), lanes_ // 2), ahead))
            with cgutils.for_range(b, steps) as inner:
                step = b.add(b.mul(group.index, steps), inner.index)
                ws = [
                    jit.dequantize(b, offset(b, words, step, lanes_ // 2), s, minus_zs, lanes_)
                    for (words, _, _), (s, minus_zs) in zip(rows, scales, strict=True)
                ]
                for i in range(m_):
                    x_at = b.add(offset(b, x, step, 4 * lanes_ * m_), const(I64, 4 * lanes_ * i))
                    x_row = load(b, x_at, floats_t)
                    for j, w in enumerate(ws):
                        jit.add_product(b, sums[i, j], w, x_row)
        jit.add_to_out(b, args, m, n, k, sums)
        return context.get_dummy_value()

    return types.void(kind, lanes, tile_m, tile_n, *[types.int64] * 7), codegen
