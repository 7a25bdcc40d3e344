"""The instruction table: mnemonic -> a function that turns an Instruction into a Step, once per kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import UnknownInstruction
from .operands import Reader
from .program import Instruction
from .state import Gang

Array = NDArray[Any]
Step = Callable[[Gang], None]
Build = Callable[[Instruction], Step]

TABLE: dict[str, Build] = {}
# Instructions whose whole effect is one uint32 into the VGPR of operand 0: those that a dual issue may pair.
VALUES: dict[str, Callable[[Instruction], Reader]] = {}


def define(*names: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        TABLE.update(dict.fromkeys(names, build))
        return build

    return add


def value(*names: str) -> Callable[[Callable[[Instruction], Reader]], Callable[[Instruction], Reader]]:
    """Defines instructions by the uint32 they put into operand 0."""

    def add(read: Callable[[Instruction], Reader]) -> Callable[[Instruction], Reader]:
        def build(instruction: Instruction) -> Step:
            result, index = read(instruction), destination(instruction)
            return lambda gang: gang.write(index, result(gang))

        for name in names:
            VALUES[name], TABLE[name] = read, build
        return read

    return add


def destination(instruction: Instruction) -> int:
    operand = instruction.operands[0]
    if operand.kind != "v":
        raise UnknownInstruction(f"{instruction.text!r}: its result goes to {operand.text}, wanted a VGPR.")
    return operand.index


def dual(instruction: Instruction, second: Instruction) -> Step:
    """Both halves read before either writes."""
    reads, into = [], []
    for half in (instruction, second):
        name = half.mnemonic.replace("v_dual_", "v_")
        if name not in VALUES:
            raise UnknownInstruction(f"{half.text!r} in a dual issue is unknown to the gfx11 emulator.")
        reads.append(VALUES[name](half))
        into.append(destination(half))

    def step(gang: Gang) -> None:
        first, other = reads[0](gang), np.array(reads[1](gang))
        gang.write(into[0], first)
        gang.write(into[1], other)

    return step


def refuse(instruction: Instruction, *modifiers: str) -> None:
    used = [name for name in modifiers if name in instruction.modifiers]
    if used:
        raise UnknownInstruction(f"{instruction.text!r}: the modifier {used[0]} is unknown to the gfx11 emulator.")
