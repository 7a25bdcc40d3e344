"""What cpu_decode and cpu_prefill are made of: vector instructions, the arguments of a task, its compilation.

numba has no vector type and vectorises these loops badly, so the inner loops are written as LLVM IR with explicit
vectors; LLVM splits each into the registers of the CPU it finds. Addresses and counts are int64.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from torch import Tensor

from ..layouts import EXLLAMA_ORDER, PackedWeight
from ..weight import SYMMETRIC_ZERO
from ._compiling import compiling

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
SHIFTS = tuple(4 * EXLLAMA_ORDER.index(i) for i in range(8))  # where value i of a word sits
BF16, FP16, FP32 = 0, 1, 2  # dtype of the scales
KINDS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
SCALE_BYTES, SCALE_TYPES = (2, 2, 4), (I16, I16, F32)
LANES = 16 if "+avx512f" in get_host_cpu_features().split(",") else 8

# What a task is given, as int64. Rows are strides in bytes; zero_step is 0 where all groups share one zero point.
FIELDS = (
    *("next_chunk", "next_worker", "words", "word_row", "scales", "scale_row", "zeros", "zero_row", "zero_step"),
    *("x", "x_row", "x_sums", "out", "out_row", "m", "n", "k", "group", "block_m", "block_n", "block_k", "scratch"),
)
Args: Any = type("Args", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_int64) for name in FIELDS]})
_SYMMETRIC = torch.full((LANES,), SYMMETRIC_ZERO, dtype=torch.uint8)


def task_args(*, weight: PackedWeight, out: Tensor, m: int, **rest: int) -> Any:
    """The arguments of a task; it reads the tensors by address, so the caller keeps them."""
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    shared = zeros is None
    return Args(
        words=codes.data_ptr(),
        word_row=4 * codes.stride(0),
        scales=scales.data_ptr(),
        scale_row=scales.element_size() * scales.stride(0),
        zeros=_SYMMETRIC.data_ptr() if zeros is None else zeros.data_ptr(),
        zero_row=0 if zeros is None else zeros.stride(0),
        zero_step=0 if shared else 1,
        out=out.data_ptr(),
        out_row=4 * out.stride(0),
        m=m,
        n=weight.n,
        k=weight.k,
        group=weight.group,
        **rest,
    )


def columns_at_a_time(limit: int, group: int, k: int) -> int:
    """Columns of K in one block: whole groups up to `limit`, or an equal part of a group larger than that."""
    if group <= limit:
        return limit // group * group
    return limit if group == k or group % limit == 0 else group


def compile_task(task: Any) -> Any:
    """The task as a C function of one int64, the address of its Args; compiled once per machine and kept on disk.

    numba's cache looks at the task's own file only, so the name carries what this file holds.
    """
    kernel = task.__name__
    task.__qualname__ += f"_{_REVISION:08x}"
    with compiling(kernel, "NUMBA_CACHE_DIR"):
        return cfunc(types.void(types.int64), cache=True, error_model="numpy")(task)


_REVISION = zlib.crc32(Path(__file__).read_bytes())


def field(b: ir.IRBuilder, args: ir.Value, name: str) -> ir.Value:
    return load(b, b.add(args, const(I64, 8 * FIELDS.index(name))), I64, 8)


@intrinsic(prefer_literal=True)
def get(_typing, args, name):
    """A field of the arguments."""

    def codegen(_context, b, _signature, values):
        return field(b, values[0], name.literal_value)

    return types.int64(types.int64, name), codegen


@intrinsic(prefer_literal=True)
def take(_typing, args, name):
    """Adds one to a field, atomically; returns what it was."""

    def codegen(_context, b, _signature, values):
        at = b.inttoptr(b.add(values[0], const(I64, 8 * FIELDS.index(name.literal_value))), I64.as_pointer())
        return b.atomic_rmw("add", at, const(I64, 1), "monotonic")

    return types.int64(types.int64, name), codegen


def weight_at(b: ir.IRBuilder, args: ir.Value, n: ir.Value, k: ir.Value, g: ir.Value, kind: int) -> list[ir.Value]:
    """Addresses of the words, scale and zero point of W[n, k], k in group g."""

    def at(base: str, row: str, column: ir.Value) -> ir.Value:
        return b.add(offset(b, field(b, args, base), n, field(b, args, row)), column)

    words = at("words", "word_row", b.lshr(k, const(I64, 1)))
    scale = at("scales", "scale_row", b.mul(g, const(I64, SCALE_BYTES[kind])))
    return [words, scale, at("zeros", "zero_row", b.mul(g, field(b, args, "zero_step")))]


def clamped(b: ir.IRBuilder, first: ir.Value, count: int, end: ir.Value) -> list[ir.Value]:
    """Indices first, first+1, ...; those past the end name the last row, which a tile then reads twice."""
    last = b.sub(end, const(I64, 1))
    rows = [b.add(first, const(I64, i)) for i in range(count)]
    return [b.select(b.icmp_signed("<", row, last), row, last) for row in rows]


def add_to_out(
    b: ir.IRBuilder, args: ir.Value, m: ir.Value, n: ir.Value, k: ir.Value, sums: dict[Any, ir.Value]
) -> None:
    """out[m + i, n + j] += the lanes of sums[i, j]; the first block of K overwrites."""
    first_block = b.icmp_signed("==", k, const(I64, 0))
    totals = lane_sums(b, [b.load(slot) for slot in sums.values()])
    for (i, j), total in zip(sums, totals, strict=True):
        at = out_at(b, args, b.add(m, const(I64, i)), b.add(n, const(I64, j)))
        before = b.select(first_block, const(F32, 0.0), load(b, at, F32))
        store(b, b.fadd(before, total), at)


def out_at(b: ir.IRBuilder, args: ir.Value, m: ir.Value, n: ir.Value) -> ir.Value:
    """The address of out[m, n], which has whole tiles: see `out_scratch`."""
    return offset(b, offset(b, field(b, args, "out"), m, field(b, args, "out_row")), n, 4)


def const(ty: ir.Type, value: float | Iterable[int]) -> ir.Constant:
    """`value` as `ty`: one number in every lane, or one number a lane."""
    if not isinstance(ty, ir.VectorType):
        return ir.Constant(ty, value)
    return ir.Constant(ty, [value] * ty.count if isinstance(value, int | float) else list(value))


def offset(b: ir.IRBuilder, base: ir.Value, index: ir.Value, stride: ir.Value | int) -> ir.Value:
    return b.add(base, b.mul(index, const(I64, stride) if isinstance(stride, int) else stride))


def load(b: ir.IRBuilder, address: ir.Value, ty: ir.Type, align: int = 4) -> ir.Value:
    value = b.load(b.inttoptr(address, ty.as_pointer()))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 4


def accumulators(b: ir.IRBuilder, rows: int, columns: int, lanes: int) -> dict[tuple[int, int], ir.Value]:
    """A vector of zeros for each (i, j) of a tile, j the slower index; LLVM keeps them in registers."""
    slots = {(i, j): cgutils.alloca_once(b, ir.VectorType(F32, lanes)) for j in range(columns) for i in range(rows)}
    clear(b, slots)
    return slots


def clear(b: ir.IRBuilder, slots: dict[tuple[int, int], ir.Value]) -> None:
    for slot in slots.values():
        b.store(const(slot.type.pointee, 0.0), slot)


def add_product(b: ir.IRBuilder, slot: ir.Value, x: ir.Value, y: ir.Value) -> None:
    b.store(fma(b, x, y, b.load(slot)), slot)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    name = f"llvm.fma.v{x.type.count}f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type] * 3), name), [x, y, z])


def shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: Iterable[int]) -> ir.Value:
    index = list(lanes)
    return b.shuffle_vector(x, y, const(ir.VectorType(I32, len(index)), index))


def spread(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """Each element of a vector repeated over an equal share of the lanes."""
    share = lanes // value.type.count
    return shuffle(b, value, value, (i // share for i in range(lanes)))


def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Asks for a cache line; one that does not exist is harmless."""
    ty = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, ty, "llvm.prefetch.p0")
    b.call(function, [b.inttoptr(address, I8.as_pointer()), const(I32, 0), const(I32, 3), const(I32, 1)])


def scale_and_shift(
    b: ir.IRBuilder, scale: ir.Value, zero: ir.Value, kind: int, lanes: int, groups: int = 1
) -> tuple[ir.Value, ir.Value]:
    """Vectors s and -z*s of `groups` neighbouring groups, from their addresses: w = q*s + (-z*s)."""
    scales = load(b, scale, ir.VectorType(SCALE_TYPES[kind], groups), 2)
    s, shift = _to_fp32(b, scales, load(b, zero, ir.VectorType(I8, groups), 1), kind)
    return spread(b, s, lanes), spread(b, shift, lanes)


def scale_and_shift_of_rows(
    b: ir.IRBuilder, scales: list[ir.Value], zeros: list[ir.Value], kind: int
) -> tuple[ir.Value, ir.Value]:
    """The same with one row of W in each lane."""
    return _to_fp32(b, gather(b, scales, SCALE_TYPES[kind]), gather(b, zeros, I8), kind)


def gather(b: ir.IRBuilder, addresses: list[ir.Value], element: ir.Type) -> ir.Value:
    """The values at the addresses, one in each lane."""
    vector = ir.Constant(ir.VectorType(element, len(addresses)), ir.Undefined)
    for lane, address in enumerate(addresses):
        vector = b.insert_element(vector, load(b, address, element, 1), const(I32, lane))
    return vector


def _to_fp32(b: ir.IRBuilder, scales: ir.Value, zeros: ir.Value, kind: int) -> tuple[ir.Value, ir.Value]:
    floats, words = ir.VectorType(F32, scales.type.count), ir.VectorType(I32, scales.type.count)
    if kind == BF16:
        scales = b.bitcast(b.shl(b.zext(scales, words), const(words, 16)), floats)
    elif kind == FP16:
        scales = _from_fp16(b, b.zext(scales, words), floats)
    return scales, b.fneg(b.fmul(scales, b.uitofp(zeros, floats)))


def _from_fp16(b: ir.IRBuilder, bits: ir.Value, floats: ir.Type) -> ir.Value:
    """By hand, as LLVM calls a function that not every machine has: move the exponent, then mend its bias."""
    words = bits.type
    magnitude = b.bitcast(b.shl(b.and_(bits, const(words, 0x7FFF)), const(words, 13)), floats)
    sign = b.shl(b.and_(bits, const(words, 0x8000)), const(words, 16))
    return b.bitcast(b.or_(b.bitcast(b.fmul(magnitude, const(floats, 2.0**112)), words), sign), floats)


def dequantize(b: ir.IRBuilder, address: ir.Value, scale: ir.Value, shift: ir.Value, lanes: int) -> ir.Value:
    """The next `lanes` weights of a row, in the order of K."""
    words = spread(b, load(b, address, ir.VectorType(I32, lanes // 8)), lanes)
    q = b.and_(b.lshr(words, const(words.type, SHIFTS * (lanes // 8))), const(words.type, 15))
    return fma(b, b.sitofp(q, ir.VectorType(F32, lanes)), scale, shift)


def lane_sums(b: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
    """The sum of each vector's lanes, as scalars, by a tree that adds several vectors at once."""

    def halve(x: ir.Value, y: ir.Value, lanes: int) -> ir.Value:
        return b.fadd(shuffle(b, x, y, range(0, lanes, 2)), shuffle(b, x, y, range(1, lanes, 2)))

    sums: list[ir.Value] = []
    while vectors:
        width = vectors[0].type.count
        while width > len(vectors):
            width //= 2
        tree, vectors = vectors[:width], vectors[width:]
        while len(tree) > 1:
            tree = [halve(x, y, 2 * x.type.count) for x, y in zip(tree[::2], tree[1::2], strict=True)]
        total = tree[0]
        while total.type.count > width:
            total = halve(total, total, total.type.count)
        sums += [b.extract_element(total, const(I32, i)) for i in range(width)]
    return sums
