"""WMMA 16x16x16: A and B lie in lanes 0 to 15 and again in 16 to 31, a row of 16 values a lane.

Of the result, register r and lane l hold row 2r + l // 16 and column l % 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import Fault, UnknownInstruction
from .numbers import from_bf16, to_bf16
from .operands import Operand, Reader, bits
from .program import Instruction
from .state import Gang
from .table import TABLE, Array, Step, destination, refuse

U16, U32, F16, F32, F64 = np.uint16, np.uint32, np.float16, np.float32, np.float64
REGISTER, LANE = np.arange(8)[:, None], np.arange(32)[None, :]
ROW, COLUMN = 2 * REGISTER + LANE // 16, np.broadcast_to(LANE % 16, (8, 32))
ACCUMULATOR = 8  # registers
Decode = Callable[[Array], Array]


def _matrix(gang: Gang, operand: Operand, registers: int, decode: Decode) -> Array:
    """float64 [waves, 16, 16]: a row a lane."""
    held = gang.v[operand.index : operand.index + registers]
    if not np.array_equal(held[:, :, :16], held[:, :, 16:]):
        raise Fault(f"WMMA operand {operand.text} is not replicated in lanes 16 to 31")
    return decode(np.ascontiguousarray(held[:, :, :16].transpose(1, 2, 0))).astype(F64)


def _product(gang: Gang, i: Instruction, registers: int, decode: tuple[Decode, Decode]) -> Array:
    """float64 [8, waves, 32]."""
    if not gang.full:
        raise Fault("WMMA with inactive lanes")
    a, b = (_matrix(gang, o, registers, d) for o, d in zip(i.operands[1:3], decode, strict=True))
    return (a @ b.transpose(0, 2, 1))[:, ROW, COLUMN].transpose(1, 0, 2)


def _addend(operand: Operand, float_bits: type) -> Reader:
    """uint32 [8, waves, 32] or a constant."""
    if operand.kind == "v":
        return lambda gang: gang.v[operand.index : operand.index + ACCUMULATOR]
    if operand.kind == "constant":
        return bits(operand, 0, float_bits)
    raise UnknownInstruction(f"WMMA addend {operand.text!r}: wanted VGPRs or a constant.")


def _halves(x: Array) -> Array:
    return x.view(F16)


def _bf16(x: Array) -> Array:
    return from_bf16(x.view(U16))


def _bytes(signed: bool) -> Decode:
    return lambda x: x.view(np.int8 if signed else np.uint8)


def _to_float(decode: Decode) -> Any:
    def build(i: Instruction) -> Step:
        refuse(i, "neg_lo", "neg_hi", "clamp")
        c, into = _addend(i.operands[3], F32), destination(i)

        def step(gang: Gang) -> None:
            total = _product(gang, i, 8, (decode, decode)) + c(gang).view(F32)
            gang.v[into : into + ACCUMULATOR] = total.astype(F32).view(U32)

        return step

    return build


def _to_half(decode: Decode, narrow: Decode, widen: Decode) -> Any:
    """Results and addend in one half of each register, the high one with op_sel; the other half stays."""

    def build(i: Instruction) -> Step:
        refuse(i, "neg_lo", "neg_hi", "clamp")
        c, into, shift = _addend(i.operands[3], F16), destination(i), U32(16 if i.flag("op_sel", 2) else 0)

        def step(gang: Gang) -> None:
            total = _product(gang, i, 8, (decode, decode)) + widen((c(gang) >> shift).astype(U16))
            kept = gang.v[into : into + ACCUMULATOR] & ~(U32(0xFFFF) << shift)
            gang.v[into : into + ACCUMULATOR] = kept | narrow(total).view(U16).astype(U32) << shift

        return step

    return build


def _to_integer(i: Instruction) -> Step:
    refuse(i, "clamp")
    c, into = _addend(i.operands[3], F32), destination(i)
    decode = _bytes(i.flag("neg_lo", 0)), _bytes(i.flag("neg_lo", 1))

    def step(gang: Gang) -> None:
        total = _product(gang, i, 4, decode) + c(gang).view(np.int32)
        gang.v[into : into + ACCUMULATOR] = total.astype(np.int64).astype(U32)

    return step


TABLE["v_wmma_f32_16x16x16_f16"] = _to_float(_halves)
TABLE["v_wmma_f32_16x16x16_bf16"] = _to_float(_bf16)
TABLE["v_wmma_f16_16x16x16_f16"] = _to_half(_halves, lambda x: x.astype(F16), lambda h: h.view(F16))
TABLE["v_wmma_bf16_16x16x16_bf16"] = _to_half(_bf16, to_bf16, from_bf16)
TABLE["v_wmma_i32_16x16x16_iu8"] = _to_integer
