"""SOP1, SOP2, SOPC, SOPK, SMEM: one value a wave. SCC after an operation is an overflow, a comparison or "not zero"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import Operand, bits, i32, u32, u64
from .program import Instruction
from .state import EXEC, SCC, Gang
from .table import TABLE, Array, Step, define

U32, U64, I64 = np.uint32, np.uint64, np.int64
LOW = U64(0xFFFFFFFF)


def _wide(a: Array) -> Array:
    return a.astype(I64)


def _overflows(x: Array) -> Array:
    outside: Array = (x < -(1 << 31)) | (x >= 1 << 31)
    return outside


def _extract(a: Array, control: Array) -> Array:
    """s_bfe_u32: offset in bits 4:0, width in bits 22:16."""
    width = control >> U32(16) & U32(0x7F)
    ones = (U64(1) << np.minimum(width, 32).astype(U64)) - U64(1)
    field: Array = (a >> (control & U32(31))).astype(U64) & ones
    return field


def _extract_signed(a: Array, control: Array) -> Array:
    field, width = _extract(a, control).astype(I64), np.minimum(control >> U32(16) & U32(0x7F), 32).astype(I64)
    negative = (width > 0) & (field >> np.maximum(width - 1, 0) & 1 != 0)
    return np.where(negative, field - (I64(1) << width), field)


# mnemonic -> (result, scc) of two int64 that hold the unsigned or the signed operands; scc None leaves it alone
_UNSIGNED: dict[str, Callable[[Array, Array, Array], tuple[Array, Array | None]]] = {
    "s_add_u32": lambda a, b, c: (a + b, a + b > 0xFFFFFFFF),
    "s_addc_u32": lambda a, b, c: (a + b + c, a + b + c > 0xFFFFFFFF),
    "s_sub_u32": lambda a, b, c: (a - b, b > a),
    "s_subb_u32": lambda a, b, c: (a - b - c, b + c > a),
    "s_min_u32": lambda a, b, c: (np.minimum(a, b), a < b),
    "s_max_u32": lambda a, b, c: (np.maximum(a, b), a >= b),
    "s_cselect_b32": lambda a, b, c: (np.where(c != 0, a, b), None),
    "s_pack_ll_b32_b16": lambda a, b, c: (a & 0xFFFF | (b & 0xFFFF) << 16, None),
    "s_pack_lh_b32_b16": lambda a, b, c: (a & 0xFFFF | b & 0xFFFF0000, None),
    "s_pack_hh_b32_b16": lambda a, b, c: (a >> 16 | b & 0xFFFF0000, None),
    "s_bfm_b32": lambda a, b, c: (((I64(1) << (a & 31)) - 1) << (b & 31), None),
    "s_lshl1_add_u32": lambda a, b, c: ((a << 1) + b, (a << 1) + b > 0xFFFFFFFF),
    "s_lshl2_add_u32": lambda a, b, c: ((a << 2) + b, (a << 2) + b > 0xFFFFFFFF),
    "s_lshl3_add_u32": lambda a, b, c: ((a << 3) + b, (a << 3) + b > 0xFFFFFFFF),
    "s_lshl4_add_u32": lambda a, b, c: ((a << 4) + b, (a << 4) + b > 0xFFFFFFFF),
    "s_mul_hi_u32": lambda a, b, c: ((a.astype(U64) * b.astype(U64) >> U64(32)).astype(I64), None),
}
_SIGNED: dict[str, Callable[[Array, Array], tuple[Array, Array | None]]] = {
    "s_add_i32": lambda a, b: (a + b, _overflows(a + b)),
    "s_addk_i32": lambda a, b: (a + b, _overflows(a + b)),
    "s_sub_i32": lambda a, b: (a - b, _overflows(a - b)),
    "s_mul_i32": lambda a, b: (a * b, None),
    "s_mulk_i32": lambda a, b: (a * b, None),
    "s_mul_hi_i32": lambda a, b: (a * b >> 32, None),
    "s_min_i32": lambda a, b: (np.minimum(a, b), a < b),
    "s_max_i32": lambda a, b: (np.maximum(a, b), a >= b),
    "s_absdiff_i32": lambda a, b: (np.abs(a - b), a != b),
}
# scc is "the result is not zero"
_LOGIC: dict[str, Callable[[Array, Array], Array]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "and_not1": lambda a, b: a & ~b,
    "or_not1": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
_SHIFTS: dict[str, Callable[[Array, Array], Array]] = {
    "s_lshl_b32": lambda a, b: a << (b & U32(31)),
    "s_lshr_b32": lambda a, b: a >> (b & U32(31)),
    "s_ashr_i32": lambda a, b: (a.view(np.int32) >> (b & U32(31)).astype(np.int32)).view(U32),
    "s_bfe_u32": _extract,
    "s_bfe_i32": _extract_signed,
}
_SHIFTS_64: dict[str, Callable[[Array, Array], Array]] = {
    "s_lshl_b64": lambda a, b: a << (b & U32(63)).astype(U64),
    "s_lshr_b64": lambda a, b: a >> (b & U32(63)).astype(U64),
    "s_ashr_i64": lambda a, b: (a.view(I64) >> (b & U32(63)).astype(I64)).view(U64),
}
# SOP1: result, and whether scc becomes "not zero"
_UNARY: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "s_mov_b32": (lambda a: a, False),
    "s_movk_i32": (lambda a: a, False),
    "s_not_b32": (lambda a: ~a, True),
    "s_abs_i32": (lambda a: np.abs(a.view(np.int32)).view(U32), True),
    "s_sext_i32_i16": (lambda a: a.astype(np.int16).astype(np.int32).view(U32), False),
    "s_sext_i32_i8": (lambda a: a.astype(np.int8).astype(np.int32).view(U32), False),
    "s_brev_b32": (lambda a: sum(((a >> U32(i) & U32(1)) << U32(31 - i) for i in range(32)), U32(0) * a), False),
    "s_bcnt1_i32_b32": (lambda a: np.bitwise_count(a).astype(U32), True),
    "s_ctz_i32_b32": (lambda a: np.where(a == 0, U32(0xFFFFFFFF), np.bitwise_count((a & -a) - U32(1))), False),
    "s_clz_i32_u32": (lambda a: np.where(a == 0, U32(0xFFFFFFFF), 31 - np.floor(np.log2(a + 0.5)).astype(U32)), False),
}
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}


def _put(gang: Gang, index: int, result: Array, scc: Array | None) -> None:
    gang.write_scalar(index, (result.astype(I64) & 0xFFFFFFFF).astype(U32))
    if scc is not None:
        gang.s[SCC] = scc


def _put_64(gang: Gang, index: int, result: Array) -> None:
    gang.write_scalar(index, (result & LOW).astype(U32))
    gang.write_scalar(index + 1, (result >> U64(32)).astype(U32))


def _immediate(operand: Operand) -> Operand:
    """SOPK: 16 bits, signed."""
    if operand.kind == "constant" and isinstance(operand.value, int) and operand.value >> 15 == 1:
        return Operand(text=operand.text, kind="constant", value=operand.value - (1 << 16))
    return operand


def _unsigned(name: str) -> Any:
    def build(i: Instruction) -> Step:
        a, b, into, f = u32(i.operands[1]), u32(i.operands[2]), i.operands[0].index, _UNSIGNED[name]
        return lambda gang: _put(gang, into, *f(_wide(a(gang)), _wide(b(gang)), _wide(gang.s[SCC])))

    return build


def _signed(name: str) -> Any:
    def build(i: Instruction) -> Step:
        sources = (i.operands[0], _immediate(i.operands[1])) if name[-5] == "k" else i.operands[1:]
        (a, b), into, f = (i32(o) for o in sources), i.operands[0].index, _SIGNED[name]
        return lambda gang: _put(gang, into, *f(_wide(a(gang)), _wide(b(gang))))

    return build


def _with_nonzero(f: Callable[[Array, Array], Array]) -> Any:
    def build(i: Instruction) -> Step:
        a, b, into = u32(i.operands[1]), u32(i.operands[2]), i.operands[0].index

        def step(gang: Gang) -> None:
            result = f(a(gang), b(gang))
            _put(gang, into, result, result != 0)

        return step

    return build


def _with_nonzero_64(f: Callable[[Array, Array], Array], shift: bool) -> Any:
    def build(i: Instruction) -> Step:
        a, b, into = u64(i.operands[1]), (u32 if shift else u64)(i.operands[2]), i.operands[0].index

        def step(gang: Gang) -> None:
            result = f(a(gang), b(gang))
            _put_64(gang, into, result)
            gang.s[SCC] = result != 0

        return step

    return build


def _unary(f: Callable[[Array], Array], sets_scc: bool) -> Any:
    def build(i: Instruction) -> Step:
        a, into = u32(i.operands[1]), i.operands[0].index

        def step(gang: Gang) -> None:
            result = f(a(gang))
            _put(gang, into, result, result != 0 if sets_scc else None)

        return step

    return build


def _compare(f: Callable[[Array, Array], Array], read: Any, short: bool) -> Any:
    def build(i: Instruction) -> Step:
        signed = short and read is i32
        a, b = read(i.operands[0]), read(_immediate(i.operands[1]) if signed else i.operands[1])

        def step(gang: Gang) -> None:
            gang.s[SCC] = f(a(gang), b(gang))

        return step

    return build


def _save_exec(f: Callable[[Array, Array], Array], gives_new: bool = False) -> Any:
    """EXEC = f(source, EXEC); the destination takes the old EXEC, or the new one (wrexec)."""

    def build(i: Instruction) -> Step:
        source, into = u32(i.operands[1]), i.operands[0].index

        def step(gang: Gang) -> None:
            old = gang.s[EXEC].copy()
            gang.write_scalar(EXEC, f(source(gang), old))
            gang.write_scalar(into, gang.s[EXEC].copy() if gives_new else old)
            gang.s[SCC] = gang.s[EXEC] != 0

        return step

    return build


def _load(words: int) -> Any:
    def build(i: Instruction) -> Step:
        base, into, offset = u64(i.operands[1]), i.operands[0].index, i.modifiers.get("offset", 0)
        register = i.operands[2] if i.operands[2].kind == "s" else None
        extra = u32(register) if register else None
        if extra is None and i.operands[2].kind == "constant":
            offset += int(i.operands[2].value)

        def step(gang: Gang) -> None:
            address = base(gang) + U64(offset & (1 << 64) - 1)
            if extra is not None:
                address = address + extra(gang).astype(U64)
            data = gang.memory.load(address & ~U64(3), np.ones_like(address, bool), 4 * words).view(U32)
            for part in range(words):
                gang.write_scalar(into + part, data[..., part])

        return step

    return build


@define("s_mov_b64")
def _move_64(i: Instruction) -> Step:
    source, into = u64(i.operands[1]), i.operands[0].index
    return lambda gang: _put_64(gang, into, source(gang))


@define("s_cselect_b64")
def _select_64(i: Instruction) -> Step:
    a, b, into = u64(i.operands[1]), u64(i.operands[2]), i.operands[0].index
    return lambda gang: _put_64(gang, into, np.where(gang.s[SCC] != 0, a(gang), b(gang)))


@define("s_cmov_b32")
def _move_if(i: Instruction) -> Step:
    source, old, into = u32(i.operands[1]), bits(i.operands[0]), i.operands[0].index
    return lambda gang: gang.write_scalar(into, np.where(gang.s[SCC] != 0, source(gang), old(gang)))


def _bit_test(wanted: int) -> Any:
    return _compare(lambda a, b: (a >> (b & U32(31)) & U32(1)) == wanted, u32, False)


TABLE.update({name: _unsigned(name) for name in _UNSIGNED})
TABLE.update({name: _signed(name) for name in _SIGNED})
TABLE.update({f"s_{name}_b32": _with_nonzero(f) for name, f in _LOGIC.items()})
TABLE.update({f"s_{name}_b64": _with_nonzero_64(f, False) for name, f in _LOGIC.items()})
TABLE.update({name: _with_nonzero(f) for name, f in _SHIFTS.items()})
TABLE.update({name: _with_nonzero_64(f, True) for name, f in _SHIFTS_64.items()})
TABLE.update({name: _unary(*entry) for name, entry in _UNARY.items()})
TABLE.update({f"s_{name}_saveexec_b32": _save_exec(_LOGIC[name]) for name in ("and", "or", "xor", "and_not1")})
TABLE["s_and_not0_saveexec_b32"] = _save_exec(lambda a, b: ~a & b)
TABLE["s_and_not0_wrexec_b32"] = _save_exec(lambda a, b: ~a & b, gives_new=True)
TABLE["s_and_not1_wrexec_b32"] = _save_exec(_LOGIC["and_not1"], gives_new=True)
TABLE.update({f"s_cmp_{name}_i32": _compare(f, i32, False) for name, f in _COMPARE.items()})
TABLE.update({f"s_cmp_{name}_u32": _compare(f, u32, False) for name, f in _COMPARE.items()})
TABLE.update({f"s_cmpk_{name}_i32": _compare(f, i32, True) for name, f in _COMPARE.items()})
TABLE.update({f"s_cmpk_{name}_u32": _compare(f, u32, True) for name, f in _COMPARE.items()})
TABLE.update({f"s_cmp_{name}_u64": _compare(_COMPARE[name], u64, False) for name in ("eq", "lg")})
TABLE.update({f"s_bitcmp{wanted}_b32": _bit_test(wanted) for wanted in (0, 1)})
TABLE.update({f"s_load_b{32 * words}": _load(words) for words in (1, 2, 4, 8, 16)})
