"""The numba kernels of cpu_decode and cpu_prefill: out[m, n] = sum_k x[m, k] * (q[n, k] - z[n, g]) * s[n, g].

    gemv   1 row of x     q as it stands in the word, times x scaled to match: and, convert, fma for a vector of W
    tile   2 to 8 rows    a vector of W is dequantised once and meets every row of x while it is in a register
    gemm   any number     a block of W is dequantised once into the L2 cache and meets every row of x from there

A task works on chunks of `block_n` rows of W until none is left; its threads share the chunk counter. K is cut into
blocks so that the rows of x in use stay in the L1 cache. The results depend on neither threads nor chunks.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from ._cpu_ir import (
    F32,
    I32,
    I64,
    SCALE_BYTES,
    SHIFTS,
    const,
    dequantize,
    fma,
    lane_sums,
    load,
    offset,
    prefetch,
    scale_and_shift,
    store,
)

# What a task is given, as int64. Rows are strides in bytes; zero_step is 0 where all groups share one zero point.
FIELDS = (
    *("next_chunk", "next_worker", "words", "word_row", "scales", "scale_row", "zeros", "zero_row", "zero_step"),
    *("x", "x_row", "x_sums", "out", "out_row", "m", "n", "k", "group", "block_m", "block_n", "block_k", "scratch"),
)
Args = type("Args", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_int64) for name in FIELDS]})

GEMV_ROWS = 4  # rows of W that share a load of x
TILE_ROWS = {2: 4, 4: 2, 8: 1}  # the same, by the rows of x
GEMM_M, GEMM_N = 4, 3  # 12 sums, 3 vectors of W and one of x: the 16 registers of AVX2


def _field(b: ir.IRBuilder, args: ir.Value, name: str) -> ir.Value:
    return load(b, b.add(args, const(I64, 8 * FIELDS.index(name))), I64, 8)


@intrinsic(prefer_literal=True)
def _get(_typing, args, name):
    def codegen(_context, b, _signature, values):
        return _field(b, values[0], name.literal_value)

    return types.int64(types.int64, name), codegen


@intrinsic(prefer_literal=True)
def _take(_typing, args, name):
    """Adds one to a field, atomically; returns what it was."""

    def codegen(_context, b, _signature, values):
        at = b.inttoptr(b.add(values[0], const(I64, 8 * FIELDS.index(name.literal_value))), I64.as_pointer())
        return b.atomic_rmw("add", at, const(I64, 1), "monotonic")

    return types.int64(types.int64, name), codegen


def _row(b: ir.IRBuilder, args: ir.Value, n: ir.Value, k: ir.Value, g: ir.Value, kind: int) -> list[ir.Value]:
    """Addresses of the words, scale and zero point of W[n, k], k in group g."""

    def at(base: str, row: str, column: ir.Value) -> ir.Value:
        return b.add(offset(b, _field(b, args, base), n, _field(b, args, row)), column)

    words = at("words", "word_row", b.lshr(k, const(I64, 1)))
    scale = at("scales", "scale_row", b.mul(g, const(I64, SCALE_BYTES[kind])))
    return [words, scale, at("zeros", "zero_row", b.mul(g, _field(b, args, "zero_step")))]


def _clamped(b: ir.IRBuilder, first: ir.Value, count: int, end: ir.Value) -> list[ir.Value]:
    """Indices first, first+1, ...; those past the end name the last row, which a tile then reads twice."""
    last = b.sub(end, const(I64, 1))
    rows = [b.add(first, const(I64, i)) for i in range(count)]
    return [b.select(b.icmp_signed("<", row, last), row, last) for row in rows]


def _vectors(b: ir.IRBuilder, count: int, lanes: int) -> list[ir.Value]:
    return [cgutils.alloca_once(b, ir.VectorType(F32, lanes)) for _ in range(count)]


def _clear(b: ir.IRBuilder, slots: list[ir.Value]) -> None:
    for slot in slots:
        b.store(const(slot.type.pointee, 0.0), slot)


def _add_to_out(b: ir.IRBuilder, args: ir.Value, m: ir.Value, n: ir.Value, k: ir.Value, sums: dict) -> None:
    """out[m + i, n + j] += sums[i, j] where that is inside the matrix; the first block of K overwrites."""
    first_block = b.icmp_signed("==", k, const(I64, 0))
    for (i, j), value in sums.items():
        row, column = b.add(m, const(I64, i)), b.add(n, const(I64, j))
        m_in, n_in = (b.icmp_signed("<", at, _field(b, args, size)) for at, size in ((row, "m"), (column, "n")))
        with b.if_then(b.and_(m_in, n_in), likely=True):
            at = offset(b, offset(b, _field(b, args, "out"), row, _field(b, args, "out_row")), column, 4)
            before = b.select(first_block, const(F32, 0.0), load(b, at, F32))
            store(b, b.fadd(before, value), at)


@intrinsic(prefer_literal=True)
def _gemv_rows(_typing, kind, lanes, groups, args, n, steps, runs):
    """GEMV_ROWS rows of W times one row of x. A run of steps shares its scales: a group, or `groups` of them a vector.

    x holds for each vector of words the eight vectors of values they meet, each times 2^-(where its nibble sits).
    """
    kind_, lanes_, groups_ = kind.literal_value, lanes.literal_value, groups.literal_value

    def codegen(context, b, _signature, values):
        args, n, steps, runs = values[3:]
        words_t, floats_t, zero = ir.VectorType(I32, lanes_), ir.VectorType(F32, lanes_), const(I64, 0)
        rows = [_row(b, args, row, zero, zero, kind_) for row in _clamped(b, n, GEMV_ROWS, _field(b, args, "n"))]
        ahead = b.mul(_field(b, args, "word_row"), const(I64, GEMV_ROWS))
        totals, sums = _vectors(b, GEMV_ROWS, lanes_), _vectors(b, GEMV_ROWS, lanes_)
        _clear(b, totals)
        with cgutils.for_range(b, runs) as run:
            _clear(b, sums)
            with cgutils.for_range(b, steps) as inner:
                step = b.add(b.mul(run.index, steps), inner.index)
                addresses = [offset(b, words, step, 4 * lanes_) for words, _, _ in rows]
                loaded = [load(b, address, words_t) for address in addresses]
                for address in addresses:
                    prefetch(b, b.add(address, ahead))
                values_at = offset(b, _field(b, args, "x"), step, 32 * lanes_)
                for i, shift in enumerate(SHIFTS):
                    x = load(b, b.add(values_at, const(I64, 4 * lanes_ * i)), floats_t)
                    for word, part in zip(loaded, sums, strict=True):
                        # the top nibble is moved, as in place it would be read as a sign
                        q = b.lshr(word, const(words_t, 28)) if shift == 28 else b.and_(word, const(words_t, 15 << shift))
                        b.store(fma(b, b.sitofp(q, floats_t), x, b.load(part)), part)
            group = b.mul(run.index, const(I64, groups_))
            x_sum = load(b, offset(b, _field(b, args, "x_sums"), run.index, 4 * lanes_), floats_t)
            for (_, scale, zero_point), part, total in zip(rows, sums, totals, strict=True):
                scale_at = offset(b, scale, group, SCALE_BYTES[kind_])
                zero_at = offset(b, zero_point, group, _field(b, args, "zero_step"))
                s, minus_zs = scale_and_shift(b, scale_at, zero_at, kind_, lanes_, groups_)
                b.store(fma(b, s, b.load(part), fma(b, minus_zs, x_sum, b.load(total))), total)
        sums = lane_sums(b, [b.load(total) for total in totals])
        _add_to_out(b, args, zero, n, zero, {(0, j): value for j, value in enumerate(sums)})
        return context.get_dummy_value()

    return types.void(kind, lanes, groups, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def _tile(_typing, kind, lanes, tile_m, tile_n, args, m, n, k, g, run, runs):
    """tile_n rows of W times tile_m rows of x over `runs` groups of `run` columns from column k (group g)."""
    kind_, lanes_, m_, n_ = (ty.literal_value for ty in (kind, lanes, tile_m, tile_n))

    def codegen(context, b, _signature, values):
        args, m, n, k, g, run, runs = values[4:]
        floats_t = ir.VectorType(F32, lanes_)
        rows = [_row(b, args, row, k, g, kind_) for row in _clamped(b, n, n_, _field(b, args, "n"))]
        ahead = b.mul(_field(b, args, "word_row"), const(I64, n_))
        # x is [M / tile_m, K / lanes, tile_m, lanes]
        x = offset(b, _field(b, args, "x"), b.add(b.mul(m, _field(b, args, "k")), b.mul(k, const(I64, m_))), 4)
        sums = {(i, j): _vectors(b, 1, lanes_)[0] for j in range(n_) for i in range(m_)}
        _clear(b, list(sums.values()))
        steps = b.sdiv(run, const(I64, lanes_))
        with cgutils.for_range(b, runs) as group:
            scales = []
            first = b.mul(group.index, steps)
            for words, scale, zero in rows:
                scale_at = offset(b, scale, group.index, SCALE_BYTES[kind_])
                zero_at = offset(b, zero, group.index, _field(b, args, "zero_step"))
                scales.append(scale_and_shift(b, scale_at, zero_at, kind_, lanes_))
                prefetch(b, b.add(offset(b, words, first, lanes_ // 2), ahead), b.lshr(run, const(I64, 1)))
            with cgutils.for_range(b, steps) as inner:
                step = b.add(first, inner.index)
                ws = [
                    dequantize(b, offset(b, words, step, lanes_ // 2), s, minus_zs, lanes_)
                    for (words, _, _), (s, minus_zs) in zip(rows, scales, strict=True)
                ]
                for i in range(m_):
                    values_at = b.add(offset(b, x, step, 4 * lanes_ * m_), const(I64, 4 * lanes_ * i))
                    row = load(b, values_at, floats_t)
                    for j, w in enumerate(ws):
                        b.store(fma(b, w, row, b.load(sums[i, j])), sums[i, j])
        totals = lane_sums(b, [b.load(slot) for slot in sums.values()])
        _add_to_out(b, args, m, n, k, dict(zip(sums, totals, strict=True)))
        return context.get_dummy_value()

    return types.void(kind, lanes, tile_m, tile_n, *[types.int64] * 7), codegen


@intrinsic(prefer_literal=True)
def _dequantize_row(_typing, kind, lanes, args, n, k, g, run, runs, to):
    """W[n, k : k + run * runs] as fp32 at address `to`."""
    kind_, lanes_ = kind.literal_value, lanes.literal_value

    def codegen(context, b, _signature, values):
        args, n, k, g, run, runs, to = values[2:]
        words, scale, zero = _row(b, args, n, k, g, kind_)
        steps = b.sdiv(run, const(I64, lanes_))
        with cgutils.for_range(b, runs) as group:
            scale_at = offset(b, scale, group.index, SCALE_BYTES[kind_])
            zero_at = offset(b, zero, group.index, _field(b, args, "zero_step"))
            s, minus_zs = scale_and_shift(b, scale_at, zero_at, kind_, lanes_)
            with cgutils.for_range(b, steps) as inner:
                step = b.add(b.mul(group.index, steps), inner.index)
                w = dequantize(b, offset(b, words, step, lanes_ // 2), s, minus_zs, lanes_)
                store(b, w, offset(b, to, step, 4 * lanes_))
        return context.get_dummy_value()

    return types.void(kind, lanes, *[types.int64] * 7), codegen


@intrinsic(prefer_literal=True)
def _gemm_tile(_typing, lanes, args, m, n, k, columns, w, w_row):
    """GEMM_N dequantised rows of W at address w times GEMM_M rows of x, over `columns` columns from column k."""
    lanes_ = lanes.literal_value

    def codegen(context, b, _signature, values):
        args, m, n, k, columns, w, w_row = values[1:]
        floats_t, x_row = ir.VectorType(F32, lanes_), _field(b, args, "x_row")
        x = offset(b, _field(b, args, "x"), k, 4)
        xs = [offset(b, x, row, x_row) for row in _clamped(b, m, GEMM_M, _field(b, args, "m"))]
        ws = [offset(b, w, const(I64, j), w_row) for j in range(GEMM_N)]
        sums = {(i, j): _vectors(b, 1, lanes_)[0] for j in range(GEMM_N) for i in range(GEMM_M)}
        _clear(b, list(sums.values()))
        with cgutils.for_range(b, b.sdiv(columns, const(I64, lanes_))) as step:
            at = b.mul(step.index, const(I64, 4 * lanes_))
            loaded = [load(b, b.add(row, at), floats_t) for row in ws]
            for i, row in enumerate(xs):
                x = load(b, b.add(row, at), floats_t)
                for j, values in enumerate(loaded):
                    b.store(fma(b, values, x, b.load(sums[i, j])), sums[i, j])
        totals = lane_sums(b, [b.load(slot) for slot in sums.values()])
        _add_to_out(b, args, m, n, k, dict(zip(sums, totals, strict=True)))
        return context.get_dummy_value()

    return types.void(lanes, *[types.int64] * 7), codegen


def _compile(task: Any) -> Any:
    return cfunc(types.void(types.int64), cache=True, error_model="numpy")(task)


@functools.cache
def gemv(kind: int, lanes: int, groups: int) -> Any:
    def task(args):
        block, end, k, group = _get(args, "block_n"), _get(args, "n"), _get(args, "k"), _get(args, "group")
        run = max(group, 8 * lanes)
        first = _take(args, "next_chunk") * block
        while first < end:
            for n in range(first, min(first + block, end), GEMV_ROWS):
                _gemv_rows(kind, lanes, groups, args, n, run // (8 * lanes), k // run)
            first = _take(args, "next_chunk") * block

    return _compile(task)


@functools.cache
def tile(kind: int, lanes: int, tile_m: int) -> Any:
    tile_n = TILE_ROWS[tile_m]

    def task(args):
        block, end, k_end, group = _get(args, "block_n"), _get(args, "n"), _get(args, "k"), _get(args, "group")
        block_k, m_end = _get(args, "block_k"), _get(args, "m")
        first = _take(args, "next_chunk") * block
        while first < end:
            for k in range(0, k_end, block_k):
                columns = min(block_k, k_end - k)
                run = min(group, columns)
                for m in range(0, m_end, tile_m):
                    for n in range(first, min(first + block, end), tile_n):
                        _tile(kind, lanes, tile_m, tile_n, args, m, n, k, k // group, run, columns // run)
            first = _take(args, "next_chunk") * block

    return _compile(task)


@functools.cache
def gemm(kind: int, lanes: int) -> Any:
    def task(args):
        block_m, block_n, block_k = _get(args, "block_m"), _get(args, "block_n"), _get(args, "block_k")
        m_end, n_end, k_end, group = _get(args, "m"), _get(args, "n"), _get(args, "k"), _get(args, "group")
        w_row = 4 * block_k
        buffer = _get(args, "scratch") + _take(args, "next_worker") * (block_n + GEMM_N) * w_row
        across = (n_end + block_n - 1) // block_n
        chunks = across * ((m_end + block_m - 1) // block_m)
        chunk = _take(args, "next_chunk")
        while chunk < chunks:
            m0, n0 = chunk // across * block_m, chunk % across * block_n
            m1, n1 = min(m0 + block_m, m_end), min(n0 + block_n, n_end)
            for k in range(0, k_end, block_k):
                columns = min(block_k, k_end - k)
                run = min(group, columns)
                for n in range(n0, n1):
                    to = buffer + (n - n0) * w_row
                    _dequantize_row(kind, lanes, args, n, k, k // group, run, columns // run, to)
                for m in range(m0, m1, GEMM_M):
                    for n in range(n0, n1, GEMM_N):
                        _gemm_tile(lanes, args, m, n, k, columns, buffer + (n - n0) * w_row, w_row)
            chunk = _take(args, "next_chunk")

    return _compile(task)
