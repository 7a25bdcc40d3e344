"""VOP1, VOP2, VOP3 on 32 and 64 bits: integers, fp32, conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .numbers import clamped, fused, half_towards_zero, maximum, median, minimum
from .operands import Reader, f16, f32, i32, i64, mask, u16, u32, u64
from .program import Instruction
from .state import VCC, Gang
from .table import TABLE, Array, Step, define, destination, refuse, value

U32, I32, U64, I64, F32, F16 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float16
LOW, LOW24 = U64(0xFFFFFFFF), U32(0xFFFFFF)
Function = Callable[..., Array]


def _five(n: Array) -> Array:
    """Shift counts use five bits."""
    count: Array = n & n.dtype.type(31)
    return count


def _low24(a: Array) -> Array:
    return a << I32(8) >> I32(8)


def _field(a: Array, offset: Array, width: Array) -> Array:
    return a >> _five(offset) & ((U32(1) << _five(width)) - U32(1))


def _field_signed(a: Array, offset: Array, width: Array) -> Array:
    spare = (I32(32) - _five(width)) & I32(31)
    return np.where(_five(width) == 0, I32(0), (a >> _five(offset)) << spare >> spare)


def _funnel(a: Array, b: Array, shift: Array) -> Array:
    return ((a.astype(U64) << U64(32) | b) >> shift.astype(U64)).astype(U32)


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """v_perm_b32: selectors 0..7 pick a byte of {a, b}, 8..11 a sign, 12 is 0x00, above 0xFF."""
    both = a.astype(U64) << U64(32) | b
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), U32)
    for byte in range(4):
        pick = selector >> U32(8 * byte) & U32(0xFF)
        sign_bit = np.clip(pick.astype(I64) - 8, 0, 3) * 16 + 15
        sign = (both >> sign_bit.astype(U64) & U64(1)).astype(U32) * U32(0xFF)
        plain = (both >> (np.minimum(pick, U32(7)) * U32(8)).astype(U64) & U64(0xFF)).astype(U32)
        chosen = np.where(pick <= 7, plain, np.where(pick <= 11, sign, np.where(pick == 12, U32(0), U32(0xFF))))
        result |= chosen << U32(8 * byte)
    return result


BELOW: Array = (U32(1) << np.arange(32, dtype=U32)) - U32(1)  # of each lane, the lanes before it

UNSIGNED: dict[str, Function] = {
    "v_mov_b32": lambda a: a,
    "v_not_b32": lambda a: ~a,
    "v_bfrev_b32": lambda a: sum(((a >> U32(i) & U32(1)) << U32(31 - i) for i in range(32)), U32(0) * a),
    "v_add_nc_u32": lambda a, b: a + b,
    "v_sub_nc_u32": lambda a, b: a - b,
    "v_subrev_nc_u32": lambda a, b: b - a,
    "v_add_nc_i32": lambda a, b: a + b,
    "v_sub_nc_i32": lambda a, b: a - b,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_lshlrev_b32": lambda a, b: b << _five(a),
    "v_lshrrev_b32": lambda a, b: b >> _five(a),
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_lshl_add_u32": lambda a, b, c: (a << _five(b)) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) << _five(c),
    "v_lshl_or_b32": lambda a, b, c: a << _five(b) | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xor3_b32": lambda a, b, c: a ^ b ^ c,
    "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
    "v_bfe_u32": _field,
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": lambda a, b: (a.astype(U64) * b.astype(U64) >> U64(32)).astype(U32),
    "v_mul_u32_u24": lambda a, b: (a & LOW24) * (b & LOW24),
    "v_mad_u32_u24": lambda a, b, c: (a & LOW24) * (b & LOW24) + c,
    "v_min_u32": np.minimum,
    "v_max_u32": np.maximum,
    "v_alignbit_b32": lambda a, b, c: _funnel(a, b, _five(c)),
    "v_alignbyte_b32": lambda a, b, c: _funnel(a, b, (c & U32(3)) * U32(8)),
    "v_perm_b32": _permute_bytes,
    "v_bcnt_u32_b32": lambda a, b: np.bitwise_count(a).astype(U32) + b,
    "v_mbcnt_lo_u32_b32": lambda a, b: np.bitwise_count(a & BELOW).astype(U32) + b,
    "v_mbcnt_hi_u32_b32": lambda a, b: b,
}

SIGNED: dict[str, Function] = {
    "v_ashrrev_i32": lambda a, b: b >> _five(a),
    "v_min_i32": np.minimum,
    "v_max_i32": np.maximum,
    "v_bfe_i32": _field_signed,
    "v_mul_hi_i32": lambda a, b: (a.astype(I64) * b.astype(I64) >> 32).astype(I32),
    "v_mul_i32_i24": lambda a, b: _low24(a) * _low24(b),
    "v_mad_i32_i24": lambda a, b, c: _low24(a) * _low24(b) + c,
}

FLOAT: dict[str, Function] = {
    "v_add_f32": lambda a, b: a + b,
    "v_sub_f32": lambda a, b: a - b,
    "v_subrev_f32": lambda a, b: b - a,
    "v_mul_f32": lambda a, b: a * b,
    "v_fma_f32": fused,
    "v_fmaak_f32": fused,
    "v_fmamk_f32": fused,
    "v_max_f32": maximum,
    "v_min_f32": minimum,
    "v_med3_f32": median,
    "v_max3_f32": lambda a, b, c: maximum(maximum(a, b), c),
    "v_min3_f32": lambda a, b, c: minimum(minimum(a, b), c),
    "v_rcp_f32": lambda a: F32(1) / a,
    "v_rcp_iflag_f32": lambda a: F32(1) / a,
    "v_rsq_f32": lambda a: F32(1) / np.sqrt(a),
    "v_sqrt_f32": np.sqrt,
    "v_exp_f32": np.exp2,
    "v_log_f32": np.log2,
    "v_floor_f32": np.floor,
    "v_ceil_f32": np.ceil,
    "v_trunc_f32": np.trunc,
    "v_rndne_f32": np.rint,
    "v_ldexp_f32": lambda a, b: np.ldexp(a, b.view(I32)),
    "v_fract_f32": lambda a: a - np.floor(a),
}


def _to_integer(low: int, high: int, kind: type) -> Function:
    return lambda a: np.where(np.isnan(a), 0, np.clip(np.trunc(a).astype(np.float64), low, high)).astype(kind)


# mnemonic -> (conversion, reader of its source)
CONVERSIONS: dict[str, tuple[Function, Callable[..., Reader]]] = {
    "v_cvt_f32_i32": (lambda a: a.astype(F32), i32),
    "v_cvt_f32_u32": (lambda a: a.astype(F32), u32),
    "v_cvt_f32_f16": (lambda a: a.astype(F32), f16),
    "v_cvt_u32_u16": (lambda a: a.astype(U32), u16),
    "v_cvt_u32_f32": (_to_integer(0, (1 << 32) - 1, U32), f32),
    "v_cvt_i32_f32": (_to_integer(-(1 << 31), (1 << 31) - 1, I32), f32),
    "v_cvt_f32_ubyte0": (lambda a: (a & U32(0xFF)).astype(F32), u32),
    "v_cvt_f32_ubyte1": (lambda a: (a >> U32(8) & U32(0xFF)).astype(F32), u32),
    "v_cvt_f32_ubyte2": (lambda a: (a >> U32(16) & U32(0xFF)).astype(F32), u32),
    "v_cvt_f32_ubyte3": (lambda a: (a >> U32(24)).astype(F32), u32),
}


def _value(name: str, f: Function, kind: Callable[..., Reader]) -> None:
    @value(name)
    def read(i: Instruction) -> Reader:
        refuse(i, *(() if kind is f32 else ("clamp", "op_sel")))
        sources = [kind(operand) for operand in i.operands[1:]]
        if kind is f32 and "clamp" in i.modifiers:
            return lambda gang: clamped(f(*(source(gang) for source in sources))).view(U32)
        if len(sources) == 1:
            (a,) = sources
            return lambda gang: f(a(gang)).view(U32)
        if len(sources) == 2:
            a, b = sources
            return lambda gang: f(a(gang), b(gang)).view(U32)
        a, b, c = sources
        return lambda gang: f(a(gang), b(gang), c(gang)).view(U32)


for _kind, _functions in ((u32, UNSIGNED), (i32, SIGNED), (f32, FLOAT)):
    for _name, _function in _functions.items():
        _value(_name, _function, _kind)


def _conversion(name: str, f: Function, kind: Callable[..., Reader]) -> None:
    @value(name)
    def read(i: Instruction) -> Reader:
        refuse(i, "clamp")
        source = kind(i.operands[1], i.flag("op_sel", 0)) if kind is f16 else kind(i.operands[1])
        return lambda gang: f(source(gang)).view(U32)


for _name, (_function, _kind) in CONVERSIONS.items():
    _conversion(_name, _function, _kind)


@value("v_fmac_f32")
def _multiply_accumulate(i: Instruction) -> Reader:
    refuse(i, "clamp")
    c, a, b = (f32(operand) for operand in i.operands)
    return lambda gang: fused(a(gang), b(gang), c(gang)).view(U32)


@value("v_cvt_pk_rtz_f16_f32")
def _pack_cut(i: Instruction) -> Reader:
    a, b = (f32(operand) for operand in i.operands[1:])
    return lambda gang: half_towards_zero(a(gang)) | half_towards_zero(b(gang)) << U32(16)


@value("v_cndmask_b32")
def _select(i: Instruction) -> Reader:
    """Source modifiers act on the sign bit alone, so any bits pass."""
    a, b = (f32(operand) if operand.negate or operand.absolute else u32(operand) for operand in i.operands[1:3])
    if len(i.operands) > 3:
        chosen = mask(i.operands[3])
        return lambda gang: np.where(chosen(gang), b(gang).view(U32), a(gang).view(U32))
    lanes = np.arange(32, dtype=U32)
    return lambda gang: np.where(gang.s[VCC] >> lanes & U32(1), b(gang).view(U32), a(gang).view(U32))


def _put_64(gang: Gang, index: int, result: Array) -> None:
    gang.write(index, (result & LOW).astype(U32))
    gang.write(index + 1, (result >> U64(32)).astype(U32))


SHIFTS_64: dict[str, tuple[Function, Callable[..., Reader]]] = {
    "v_lshlrev_b64": (lambda a, b: b << (a & U32(63)).astype(U64), u64),
    "v_lshrrev_b64": (lambda a, b: b >> (a & U32(63)).astype(U64), u64),
    "v_ashrrev_i64": (lambda a, b: b >> (a & U32(63)).astype(I64), i64),
}


def _shift_64(f: Function, kind: Callable[..., Reader]) -> Any:
    def build(i: Instruction) -> Step:
        a, b, into = u32(i.operands[1]), kind(i.operands[2]), destination(i)
        return lambda gang: _put_64(gang, into, f(a(gang), b(gang)).view(U64))

    return build


TABLE.update({name: _shift_64(*entry) for name, entry in SHIFTS_64.items()})


@define("v_mad_u64_u32")
def _multiply_add_64(i: Instruction) -> Step:
    into, carry = destination(i), i.operands[1].index
    a, b, c = u32(i.operands[2]), u32(i.operands[3]), u64(i.operands[4])

    def step(gang: Gang) -> None:
        product = a(gang).astype(U64) * b(gang).astype(U64)
        result = product + c(gang)
        _put_64(gang, into, result)
        gang.write_mask(carry, result < product)

    return step


@define("v_mad_i64_i32")
def _multiply_add_signed_64(i: Instruction) -> Step:
    into, a, b, c = destination(i), i32(i.operands[2]), i32(i.operands[3]), i64(i.operands[4])
    return lambda gang: _put_64(gang, into, (a(gang).astype(I64) * b(gang).astype(I64) + c(gang)).view(U64))


def _carried(sign: int, swapped: bool, carry_in: bool) -> Any:
    """v_add_co, v_sub_co and kin: the carry out of 32 bits goes to a lane mask."""

    def build(i: Instruction) -> Step:
        refuse(i, "clamp")
        sources = i.operands[3:1:-1] if swapped else i.operands[2:4]
        (a, b), into, out = (u32(o) for o in sources), destination(i), i.operands[1].index
        carry = mask(i.operands[4]) if carry_in else None

        def step(gang: Gang) -> None:
            other = b(gang).astype(I64) + (carry(gang).astype(I64) if carry else 0)
            result = a(gang).astype(I64) + sign * other
            gang.write(into, (result & 0xFFFFFFFF).astype(U32))
            gang.write_mask(out, (result < 0) | (result > 0xFFFFFFFF))

        return step

    return build


for _name, _sign, _swapped in (("add", 1, False), ("sub", -1, False), ("subrev", -1, True)):
    TABLE[f"v_{_name}_co_u32"] = _carried(_sign, _swapped, False)
    TABLE[f"v_{_name}_co_ci_u32"] = _carried(_sign, _swapped, True)
