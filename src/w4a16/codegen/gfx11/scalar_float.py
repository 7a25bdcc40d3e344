"""Floating point on the scalar unit (gfx1150 and up): one fp32 a wave. Comparisons set SCC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import Reader, f32, i32, u32
from .program import Instruction
from .state import SCC, Gang
from .table import TABLE, Array, Step
from .vector import CONVERSIONS, FLOAT

_SHARED = ("add", "sub", "mul", "max", "min", "ceil", "floor", "trunc", "rndne", "fmaak", "fmamk")
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lg": lambda a, b: (a < b) | (a > b),
    "neq": lambda a, b: ~(a == b),
    "nlt": lambda a, b: ~(a < b),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "nge": lambda a, b: ~(a >= b),
}


def _apply(f: Callable[..., Array], kind: Callable[..., Reader], accumulates: bool = False) -> Any:
    def build(i: Instruction) -> Step:
        sources = [kind(o) for o in (*i.operands[1:], *(i.operands[:1] if accumulates else ()))]
        into = i.operands[0].index
        return lambda gang: gang.write_scalar(into, f(*(source(gang) for source in sources)).view(np.uint32))

    return build


def _compare(f: Callable[[Array, Array], Array]) -> Any:
    def build(i: Instruction) -> Step:
        a, b = (f32(operand) for operand in i.operands)

        def step(gang: Gang) -> None:
            gang.s[SCC] = f(a(gang), b(gang))

        return step

    return build


TABLE.update({f"s_{name}_f32": _apply(FLOAT[f"v_{name}_f32"], f32) for name in _SHARED})
TABLE["s_fmac_f32"] = _apply(FLOAT["v_fma_f32"], f32, accumulates=True)
TABLE["s_cvt_f32_u32"] = _apply(CONVERSIONS["v_cvt_f32_u32"][0], u32)
TABLE["s_cvt_f32_i32"] = _apply(CONVERSIONS["v_cvt_f32_i32"][0], i32)
TABLE["s_cvt_u32_f32"] = _apply(CONVERSIONS["v_cvt_u32_f32"][0], f32)
TABLE["s_cvt_i32_f32"] = _apply(CONVERSIONS["v_cvt_i32_f32"][0], f32)
TABLE.update({f"s_cmp_{name}_f32": _compare(f) for name, f in _COMPARE.items()})
