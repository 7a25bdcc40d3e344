"""Vector instructions for the numba kernels, as LLVM IR: numba has no vector type and its loops vectorise badly here.

Addresses are int64. A vector of V floats is one or more machine registers; LLVM splits it for the CPU it finds.
"""

from __future__ import annotations

from collections.abc import Iterable

from llvmlite import ir
from numba.core import cgutils

from ..layouts import EXLLAMA_ORDER

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
SHIFTS = tuple(4 * EXLLAMA_ORDER.index(i) for i in range(8))  # where value i of a word sits
BF16, FP16, FP32 = 0, 1, 2  # dtype of the scales
SCALE_BYTES = (2, 2, 4)


def const(ty: ir.Type, value: float | Iterable[int]) -> ir.Constant:
    """`value` as `ty`: one number in every lane, or one number a lane."""
    if not isinstance(ty, ir.VectorType):
        return ir.Constant(ty, value)
    return ir.Constant(ty, [value] * ty.count if isinstance(value, (int, float)) else list(value))


def like(ty: ir.Type, element: ir.Type) -> ir.Type:
    """`element`, in as many lanes as `ty`."""
    return ir.VectorType(element, ty.count) if isinstance(ty, ir.VectorType) else element


def offset(b: ir.IRBuilder, base: ir.Value, index: ir.Value, stride: ir.Value | int) -> ir.Value:
    return b.add(base, b.mul(index, ir.Constant(I64, stride) if isinstance(stride, int) else stride))


def load(b: ir.IRBuilder, address: ir.Value, ty: ir.Type, align: int = 4) -> ir.Value:
    value = b.load(b.inttoptr(address, ty.as_pointer()))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 4


def prefetch(b: ir.IRBuilder, address: ir.Value, size: ir.Value | None = None) -> None:
    """Asks for the cache line of an address, or for every line of `size` bytes. Past the end of memory is harmless."""
    ty = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, ty, "llvm.prefetch.p0")

    def ask(at: ir.Value) -> None:
        b.call(function, [b.inttoptr(at, I8.as_pointer()), const(I32, 0), const(I32, 3), const(I32, 1)])  # read, keep

    if size is None:
        ask(address)
        return
    with cgutils.for_range(b, b.udiv(b.add(size, const(I64, 63)), const(I64, 64))) as line:
        ask(offset(b, address, line.index, 64))


def spread(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every lane, or a short vector with each element repeated over an equal share of the lanes."""
    if not isinstance(value.type, ir.VectorType):
        one = ir.VectorType(value.type, 1)
        value = b.insert_element(ir.Constant(one, ir.Undefined), value, const(I32, 0))
    share = lanes // value.type.count
    return shuffle(b, value, value, (i // share for i in range(lanes)))


def shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: Iterable[int]) -> ir.Value:
    index = list(lanes)
    return b.shuffle_vector(x, y, const(ir.VectorType(I32, len(index)), index))


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    name = f"llvm.fma.v{x.type.count}f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type] * 3), name), [x, y, z])


def load_scale(b: ir.IRBuilder, address: ir.Value, kind: int, ty: ir.Type = F32) -> ir.Value:
    """One scale, or a vector of them, as fp32."""
    if kind == FP32:
        return load(b, address, ty)
    words = like(ty, I32)
    bits = b.zext(load(b, address, like(ty, I16), 2), words)
    if kind == BF16:
        return b.bitcast(b.shl(bits, const(words, 16)), ty)
    # fp16 by hand, as LLVM calls a function that not every machine has: move the exponent, then mend its bias
    magnitude = b.bitcast(b.shl(b.and_(bits, const(words, 0x7FFF)), const(words, 13)), ty)
    sign = b.shl(b.and_(bits, const(words, 0x8000)), const(words, 16))
    return b.bitcast(b.or_(b.bitcast(b.fmul(magnitude, const(ty, 2.0**112)), words), sign), ty)


def scale_and_shift(
    b: ir.IRBuilder, scale: ir.Value, zero: ir.Value, kind: int, lanes: int, groups: int = 1
) -> tuple[ir.Value, ir.Value]:
    """The vectors s and -z*s of `groups` neighbouring groups, so that w = q*s + (-z*s)."""
    ty = F32 if groups == 1 else ir.VectorType(F32, groups)
    s = load_scale(b, scale, kind, ty)
    z = b.uitofp(load(b, zero, like(ty, I8), 1), ty)
    return spread(b, s, lanes), spread(b, b.fneg(b.fmul(s, z)), lanes)


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
