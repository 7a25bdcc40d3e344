"""Operands: their text, and functions that read them from the running waves.

A reader gives an array that broadcasts over [waves, lanes]: VGPRs are [waves, 32], SGPRs [waves, 1], constants [1, 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import UnknownInstruction
from .state import EXEC, M0, NULL, SCC, VCC, Gang

Array = NDArray[Any]
Reader = Callable[[Gang], Array]

_NAMED = {"vcc_lo": VCC, "vcc_hi": VCC + 1, "vcc": VCC, "exec_lo": EXEC, "exec_hi": EXEC + 1, "exec": EXEC}
_NAMED |= {"null": NULL, "m0": M0, "scc": SCC}
_REGISTER = re.compile(r"([vs])(?:(\d+)|\[(\d+)(?::(\d+))?\])(?:\.([lh]))?")
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)")
_FLOAT = re.compile(r"-?\d+\.\d*(e[-+]?\d+)?")
_INV_2PI = 0.15915494309189535  # the inline constant, which the assembler prints in decimal


@dataclass(frozen=True, kw_only=True)
class Operand:
    """kind      v, s, constant or off
    index     the first register
    half      l or h: the half of a VGPR that the text names, or None
    negate, absolute  source modifiers of floating-point reads
    value     of a constant
    source_lanes  of a DPP source: the lane each lane reads, or None
    """

    text: str
    kind: str
    index: int = 0
    half: str | None = None
    negate: bool = False
    absolute: bool = False
    value: int | float = 0
    source_lanes: Array | None = None


def parse_operand(text: str) -> Operand:
    body, negate, absolute = text.strip(), False, False
    if found := re.fullmatch(r"neg\((.*)\)|-(?=[vs|a])(.*)", body):
        negate, body = True, found[1] or found[2]
    if found := re.fullmatch(r"\|(.*)\||abs\((.*)\)", body):
        absolute, body = True, found[1] or found[2]
    if found := _REGISTER.fullmatch(body):
        index, half = int(found[2] or found[3]), found[5]
        return Operand(text=text, kind=found[1], index=index, half=half, negate=negate, absolute=absolute)
    if body in _NAMED:
        return Operand(text=text, kind="s", index=_NAMED[body], negate=negate, absolute=absolute)
    if body == "off":
        return Operand(text=text, kind="off")
    if _INTEGER.fullmatch(body):
        return Operand(text=text, kind="constant", value=int(body, 0), negate=negate, absolute=absolute)
    if _FLOAT.fullmatch(body):
        return Operand(text=text, kind="constant", value=float(body), negate=negate, absolute=absolute)
    raise UnknownInstruction(f"operand {text!r} is unknown to the gfx11 emulator.")


def bits(operand: Operand, part: int = 0, float_bits: type = np.float32) -> Reader:
    """uint32 of the operand's 32-bit register `part`; a float constant is a `float_bits` in the low bits."""
    if operand.kind == "v":
        index, lanes = operand.index + part, operand.source_lanes
        if lanes is not None:
            return lambda gang: np.where(gang.readable, gang.v[index][:, lanes], np.uint32(0))
        return lambda gang: gang.v[index]
    if operand.kind == "s":
        index = operand.index + (0 if operand.index == NULL else part)
        return lambda gang: gang.s[index]
    if operand.kind != "constant":
        raise UnknownInstruction(f"operand {operand.text!r} cannot be read as a value.")
    if isinstance(operand.value, float):
        if part:
            raise UnknownInstruction(f"operand {operand.text!r}: a 64-bit float constant.")
        unsigned = {2: np.uint16, 4: np.uint32}[np.dtype(float_bits).itemsize]
        word = int(np.array(operand.value, float_bits).view(unsigned))
    else:
        word = (operand.value >> (32 * part)) & 0xFFFFFFFF
    constant = np.full((1, 1), word, np.uint32)
    return lambda gang: constant


def u32(operand: Operand) -> Reader:
    return bits(operand)


def i32(operand: Operand) -> Reader:
    read = bits(operand)
    return lambda gang: read(gang).view(np.int32)


def u64(operand: Operand) -> Reader:
    low, high = bits(operand, 0), bits(operand, 1)
    return lambda gang: low(gang) | high(gang).astype(np.uint64) << np.uint64(32)


def i64(operand: Operand) -> Reader:
    read = u64(operand)
    return lambda gang: read(gang).view(np.int64)


def f32(operand: Operand) -> Reader:
    read = bits(operand)
    return _modified(operand, lambda gang: read(gang).view(np.float32))


def u16(operand: Operand, high: bool = False, float_bits: type = np.float16) -> Reader:
    """A 16-bit half: the one the text names, else the high one if `high` (op_sel)."""
    read = bits(operand, 0, float_bits)
    if operand.half == "h" or (operand.half is None and high):
        return lambda gang: (read(gang) >> np.uint32(16)).astype(np.uint16)
    return lambda gang: read(gang).astype(np.uint16)


def i16(operand: Operand, high: bool = False) -> Reader:
    read = u16(operand, high)
    return lambda gang: read(gang).view(np.int16)


def f16(operand: Operand, high: bool = False) -> Reader:
    read = u16(operand, high)
    return _modified(operand, lambda gang: read(gang).view(np.float16))


def mask(operand: Operand) -> Reader:
    """bool [waves, 32] of a lane mask in an SGPR."""
    read = bits(operand)
    lanes = np.arange(32, dtype=np.uint32)
    return lambda gang: (read(gang) >> lanes & np.uint32(1)).astype(bool)


def _modified(operand: Operand, read: Reader) -> Reader:
    if operand.absolute and operand.negate:
        return lambda gang: -np.abs(read(gang))
    if operand.absolute:
        return lambda gang: np.abs(read(gang))
    if operand.negate:
        return lambda gang: -read(gang)
    return read
