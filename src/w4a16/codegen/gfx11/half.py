"""16-bit instructions: VOP with halves of registers, VOP3P pairs, mixed FMA, bf16 dot products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .numbers import clamped, from_bf16, fused, maximum, median, minimum, to_bf16
from .operands import Operand, Reader, bits, f16, f32, i16, mask, u16
from .program import Instruction
from .state import Gang
from .table import TABLE, Array, Step, define, destination, refuse, value

U16, U32, I16, F16, F32, F64 = np.uint16, np.uint32, np.int16, np.float16, np.float32, np.float64
Function = Callable[..., Array]


def _four(n: Array) -> Array:
    """Shift counts use four bits."""
    count: Array = n & n.dtype.type(15)
    return count


BITS: dict[str, Function] = {
    "v_mov_b16": lambda a: a,
    "v_not_b16": lambda a: ~a,
    "v_add_nc_u16": lambda a, b: a + b,
    "v_add_nc_i16": lambda a, b: a + b,
    "v_sub_nc_u16": lambda a, b: a - b,
    "v_sub_nc_i16": lambda a, b: a - b,
    "v_mul_lo_u16": lambda a, b: a * b,
    "v_mad_u16": lambda a, b, c: a * b + c,
    "v_and_b16": lambda a, b: a & b,
    "v_or_b16": lambda a, b: a | b,
    "v_xor_b16": lambda a, b: a ^ b,
    "v_lshlrev_b16": lambda a, b: b << _four(a),
    "v_lshrrev_b16": lambda a, b: b >> _four(a),
    "v_cvt_f16_u16": lambda a: a.astype(F16),
    "v_min_u16": np.minimum,
    "v_max_u16": np.maximum,
}
SIGNED: dict[str, Function] = {
    "v_ashrrev_i16": lambda a, b: b >> _four(a),
    "v_cvt_f16_i16": lambda a: a.astype(F16),
    "v_min_i16": np.minimum,
    "v_max_i16": np.maximum,
}
FLOAT: dict[str, Function] = {
    "v_add_f16": lambda a, b: a + b,
    "v_sub_f16": lambda a, b: a - b,
    "v_subrev_f16": lambda a, b: b - a,
    "v_mul_f16": lambda a, b: a * b,
    "v_fma_f16": fused,
    "v_max_f16": maximum,
    "v_min_f16": minimum,
    "v_med3_f16": median,
}
PACKED_BITS: dict[str, Function] = {
    "v_pk_add_u16": lambda a, b: a + b,
    "v_pk_add_i16": lambda a, b: a + b,
    "v_pk_sub_u16": lambda a, b: a - b,
    "v_pk_sub_i16": lambda a, b: a - b,
    "v_pk_mul_lo_u16": lambda a, b: a * b,
    "v_pk_mad_u16": lambda a, b, c: a * b + c,
    "v_pk_lshlrev_b16": lambda a, b: b << _four(a),
    "v_pk_lshrrev_b16": lambda a, b: b >> _four(a),
    "v_pk_min_u16": np.minimum,
    "v_pk_max_u16": np.maximum,
}
PACKED_SIGNED: dict[str, Function] = {
    "v_pk_ashrrev_i16": lambda a, b: b >> _four(a),
    "v_pk_min_i16": np.minimum,
    "v_pk_max_i16": np.maximum,
}
PACKED_FLOAT: dict[str, Function] = {
    "v_pk_add_f16": lambda a, b: a + b,
    "v_pk_mul_f16": lambda a, b: a * b,
    "v_pk_fma_f16": fused,
    "v_pk_max_f16": maximum,
    "v_pk_min_f16": minimum,
}


def _into_high(i: Instruction) -> bool:
    """Where a 16-bit result goes: as the text names it, else as the last bit of op_sel says."""
    half = i.operands[0].half
    return half == "h" if half else i.flag("op_sel", len(i.operands) - 1)


def _half(f: Function, kind: Callable[..., Reader]) -> Any:
    def build(i: Instruction) -> Step:
        refuse(i, *(() if kind is f16 else ("clamp",)))
        sources = [kind(operand, i.flag("op_sel", n)) for n, operand in enumerate(i.operands[1:])]
        into, high, clamp = destination(i), _into_high(i), "clamp" in i.modifiers

        def step(gang: Gang) -> None:
            result = f(*(source(gang) for source in sources))
            gang.write_half(into, (clamped(result) if clamp else result).view(U16), high)

        return step

    return build


for _kind, _functions in ((u16, BITS), (i16, SIGNED), (f16, FLOAT)):
    TABLE.update({name: _half(f, _kind) for name, f in _functions.items()})


@define("v_fmac_f16")
def _multiply_accumulate(i: Instruction) -> Step:
    c, a, b = (f16(operand) for operand in i.operands)
    into, high = destination(i), _into_high(i)
    return lambda gang: gang.write_half(into, fused(a(gang), b(gang), c(gang)).view(U16), high)


@define("v_cvt_f16_f32")
def _narrow(i: Instruction) -> Step:
    source, into, high, clamp = f32(i.operands[1]), destination(i), _into_high(i), "clamp" in i.modifiers

    def step(gang: Gang) -> None:
        half = source(gang).astype(F16)
        gang.write_half(into, (clamped(half) if clamp else half).view(U16), high)

    return step


@define("v_cndmask_b16")
def _select(i: Instruction) -> Step:
    a, b = (u16(operand, i.flag("op_sel", n)) for n, operand in enumerate(i.operands[1:3]))
    chosen, into, high = mask(i.operands[3]), destination(i), _into_high(i)
    return lambda gang: gang.write_half(into, np.where(chosen(gang), b(gang), a(gang)), high)


@value("v_pack_b32_f16")
def _pack(i: Instruction) -> Reader:
    a, b = (f16(operand, i.flag("op_sel", n)) for n, operand in enumerate(i.operands[1:]))
    return lambda gang: a(gang).view(U16).astype(U32) | b(gang).view(U16).astype(U32) << U32(16)


def _lane(operand: Operand, kind: type, high: bool, negate: bool) -> Reader:
    """One half of a packed source. A float constant is fp16 in a float operation and fp32 in an integer one."""
    word = bits(operand, 0, F16 if kind is F16 else F32)
    shift = U32(16 if high else 0)
    if negate:
        return lambda gang: -((word(gang) >> shift).astype(U16).view(kind))
    return lambda gang: (word(gang) >> shift).astype(U16).view(kind)


def _packed(name: str, f: Function, kind: type) -> None:
    @value(name)
    def read(i: Instruction) -> Reader:
        refuse(i, *(() if kind is F16 else ("clamp", "neg_lo", "neg_hi")))
        halves = []
        for select, negate, default in (("op_sel", "neg_lo", 0), ("op_sel_hi", "neg_hi", 1)):
            numbered = enumerate(i.operands[1:])
            halves.append([_lane(o, kind, i.flag(select, n, default), i.flag(negate, n)) for n, o in numbered])
        clamp = "clamp" in i.modifiers

        def result(gang: Gang) -> Array:
            low, high = (f(*(source(gang) for source in half)) for half in halves)
            if clamp:
                low, high = clamped(low), clamped(high)
            return low.view(U16).astype(U32) | high.view(U16).astype(U32) << U32(16)

        return result


for _dtype, _functions in ((U16, PACKED_BITS), (I16, PACKED_SIGNED), (F16, PACKED_FLOAT)):
    for _name, _function in _functions.items():
        _packed(_name, _function, _dtype)


def _mixed(i: Instruction) -> Reader:
    """FMA of fp32 and fp16 sources: op_sel_hi says which are fp16, op_sel which half they are."""
    sources = []
    for n, operand in enumerate(i.operands[1:]):
        narrow = f16(operand, i.flag("op_sel", n))
        sources.append((lambda gang, r=narrow: r(gang).astype(F32)) if i.flag("op_sel_hi", n) else f32(operand))
    clamp = "clamp" in i.modifiers

    def result(gang: Gang) -> Array:
        total = fused(*(source(gang) for source in sources))
        return clamped(total) if clamp else total

    return result


@value("v_fma_mix_f32")
def _mix(i: Instruction) -> Reader:
    total = _mixed(i)
    return lambda gang: total(gang).view(U32)


@define("v_fma_mixlo_f16", "v_fma_mixhi_f16")
def _mix_narrow(i: Instruction) -> Step:
    total, into, high = _mixed(i), destination(i), i.mnemonic == "v_fma_mixhi_f16"
    return lambda gang: gang.write_half(into, total(gang).astype(F16).view(U16), high)


def _pairs(word: Array, decode: Callable[[Array], Array]) -> tuple[Array, Array]:
    return decode(word.astype(U16)).astype(F64), decode((word >> U32(16)).astype(U16)).astype(F64)


def _dot(a: Array, b: Array, c: Array, decode: Callable[[Array], Array]) -> Array:
    (a0, a1), (b0, b1) = _pairs(a, decode), _pairs(b, decode)
    total: Array = a0 * b0 + a1 * b1 + c
    return total.astype(F32)


@define("v_dot2_bf16_bf16")
def _dot_bf16(i: Instruction) -> Step:
    """Rounded once; the ISA text can be read as rounding every step, which differs only if both products count."""
    a, b, c = bits(i.operands[1]), bits(i.operands[2]), u16(i.operands[3], i.flag("op_sel", 2))
    into, high = destination(i), _into_high(i)

    def step(gang: Gang) -> None:
        total = _dot(a(gang), b(gang), from_bf16(c(gang)).astype(F64), from_bf16)
        gang.write_half(into, to_bf16(total), high)

    return step


@value("v_dot2_f32_f16", "v_dot2acc_f32_f16", "v_dot2c_f32_f16")
def _dot_f16(i: Instruction) -> Reader:
    a, b, c = bits(i.operands[1]), bits(i.operands[2]), f32(i.operands[3 if len(i.operands) > 3 else 0])
    return lambda gang: _dot(a(gang), b(gang), c(gang), lambda h: h.view(F16)).view(U32)


@value("v_dot2_f32_bf16")
def _dot_f32_bf16(i: Instruction) -> Reader:
    a, b, c = bits(i.operands[1]), bits(i.operands[2]), f32(i.operands[3])
    return lambda gang: _dot(a(gang), b(gang), c(gang), from_bf16).view(U32)
