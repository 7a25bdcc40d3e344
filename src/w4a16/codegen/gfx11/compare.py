"""VOPC: comparisons into a lane mask (v_cmp) or into EXEC (v_cmpx)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import Reader, f16, f32, i16, i32, i64, u16, u32, u64
from .program import Instruction
from .state import EXEC, VCC
from .table import TABLE, Array, Step

Function = Callable[[Array, Array], Array]

ORDERED: dict[str, Function] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
INTEGER: dict[str, Function] = {**ORDERED, "ne": np.not_equal}
FLOAT: dict[str, Function] = {
    **ORDERED,
    "lg": lambda a, b: (a < b) | (a > b),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": lambda a, b: ~(a == b),
    "nlt": lambda a, b: ~(a < b),
}
TYPES: dict[str, tuple[dict[str, Function], Callable[..., Reader]]] = {
    "i16": (INTEGER, i16),
    "u16": (INTEGER, u16),
    "i32": (INTEGER, i32),
    "u32": (INTEGER, u32),
    "i64": (INTEGER, i64),
    "u64": (INTEGER, u64),
    "f16": (FLOAT, f16),
    "f32": (FLOAT, f32),
}


def _compare(f: Function, kind: Callable[..., Reader], into_exec: bool) -> Any:
    def build(i: Instruction) -> Step:
        sources = i.operands[-2:]
        if kind in (i16, u16, f16):
            a, b = (kind(operand, i.flag("op_sel", n)) for n, operand in enumerate(sources))
        else:
            a, b = (kind(operand) for operand in sources)
        into = EXEC if into_exec else i.operands[0].index if len(i.operands) == 3 else VCC
        return lambda gang: gang.write_mask(into, f(a(gang), b(gang)))

    return build


for _type, (_functions, _kind) in TYPES.items():
    for _name, _function in _functions.items():
        TABLE[f"v_cmp_{_name}_{_type}"] = _compare(_function, _kind, False)
        TABLE[f"v_cmpx_{_name}_{_type}"] = _compare(_function, _kind, True)
