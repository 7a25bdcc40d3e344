"""The three instructions of an IEEE fp32 division, for numbers that need no scaling (neither huge nor tiny)."""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .numbers import fused
from .operands import Reader, f32
from .program import Instruction
from .state import VCC, Gang
from .table import Array, Step, define, destination, value

F32, U32 = np.float32, np.uint32
FARTHEST = 96  # a quotient of exponents this far apart is scaled


def _exponent(x: Array) -> Array:
    return (x.view(U32) >> U32(23) & U32(0xFF)).astype(np.int32)


@define("v_div_scale_f32")
def _scale(i: Instruction) -> Step:
    """Source 0 as it is, and no lane marked. Sources 1 and 2 are denominator and numerator."""
    into, marked = destination(i), i.operands[1].index
    a, denominator, numerator = (f32(operand) for operand in i.operands[2:])

    def step(gang: Gang) -> None:
        below, above = denominator(gang), numerator(gang)
        apart = np.abs(_exponent(above) - _exponent(below)) >= FARTHEST
        tiny = np.abs(F32(1) / below) < np.finfo(F32).tiny
        special = ~np.isfinite(below) | ~np.isfinite(above) | (below == 0) | (above == 0)
        if ((apart | tiny) & ~special & gang.active).any():
            raise Fault("a division that needs scaling is not modelled")
        gang.write(into, np.where((below == 0) | (above == 0), F32(np.nan), a(gang)).view(U32))
        gang.write_mask(marked, np.zeros_like(gang.active))

    return step


@define("v_div_fmas_f32")
def _multiply_add(i: Instruction) -> Step:
    a, b, c = (f32(operand) for operand in i.operands[1:])
    into, lanes = destination(i), np.arange(32, dtype=U32)

    def step(gang: Gang) -> None:
        if (gang.active & (gang.s[VCC] >> lanes & U32(1)).astype(bool)).any():
            raise Fault("a division that needs scaling is not modelled")
        gang.write(into, fused(a(gang), b(gang), c(gang)).view(U32))

    return step


@value("v_div_fixup_f32")
def _fix(i: Instruction) -> Reader:
    """The quotient, or what zeros, infinities and NaN make of it."""
    quotient, denominator, numerator = (f32(operand) for operand in i.operands[1:])

    def read(gang: Gang) -> Array:
        q, below, above = quotient(gang), denominator(gang), numerator(gang)
        sign = np.where(np.signbit(below) ^ np.signbit(above), F32(-1), F32(1))
        undefined = np.isnan(below) | np.isnan(above) | ((below == 0) & (above == 0))
        undefined |= np.isinf(below) & np.isinf(above)
        result = np.abs(q)
        result = np.where((below == 0) | np.isinf(above), F32(np.inf), result)
        result = np.where(np.isinf(below) | (above == 0), F32(0), result)
        return np.where(undefined, F32(np.nan), np.copysign(result, sign)).view(U32)

    return read
