"""Runs a compiled Launch on the tensors it names: their storages are copied in, and back when the grid is done."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compile import Compiled
from .faults import UnknownInstruction
from .lds import Meter
from .machine import LIMIT, Machine
from .memory import Array, Memory
from .program import Program, parse_program

_FORMATS = {1: "b", 2: "h", 4: "i", 8: "q"}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """executed: wave-instructions"""

    executed: int


def execute(compiled: Compiled, text: str | None = None, limit: int = LIMIT, meter: Meter | None = None) -> Execution:
    """Runs the machine code of a Launch whose tensors lie on the CPU; `text` replaces its assembly.

    `meter` counts what LDS does.
    """
    program = parse_program(compiled.asm["amdgcn"] if text is None else text)
    memory, storages = Memory(), {}
    machine = Machine(program, limit, meter)
    given = runtime_arguments(compiled)
    tensors = [(name, value) for name, value in given if isinstance(value, Tensor) and value.numel()]
    for _, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            view = _bytes(tensor)
            storages[storage.data_ptr()] = (view, memory.reserve(view))
    segment = memory.reserve(np.zeros(program.argument_bytes, np.uint8))
    memory.allow("the kernel arguments", segment, program.argument_bytes)
    addresses = {}
    for name, tensor in tensors:
        start = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
        addresses[name] = storages[tensor.untyped_storage().data_ptr()][1] + start
        memory.allow(name, addresses[name], _span(tensor))
    memory.freeze()
    memory.contents(segment, program.argument_bytes)[:] = _segment(program, given, addresses, compiled)
    machine.run(memory, segment, compiled.launch.grid, compiled.warps, compiled.shared_bytes)
    for view, address in storages.values():
        view[:] = memory.contents(address, len(view))
    return Execution(executed=machine.executed)


def runtime_arguments(compiled: Compiled) -> list[tuple[str, Any]]:
    """The arguments the machine code takes, in order: Triton makes constants of the others (None, 1, constexpr)."""
    stage = "ttir" if "ttir" in compiled.asm else "ttgir"
    header = next(line for line in compiled.asm[stage].splitlines() if "tt.func public" in line)
    names = re.findall(r"%(\w+): ", header)
    args = compiled.launch.args
    if unknown := [name for name in names if name not in args]:
        raise UnknownInstruction(f"argument {unknown[0]} of {compiled.name}: got no value, wanted one of the launch.")
    return [(name, args[name]) for name in names]


def _segment(program: Program, given: list[tuple[str, Any]], addresses: dict[str, int], compiled: Compiled) -> Array:
    """The kernel arguments as bytes; the pointers that Triton adds behind them are null."""
    segment = bytearray(program.argument_bytes)
    hidden = _hidden_values(compiled)
    visible = [a for a in program.arguments if a.kind in ("by_value", "global_buffer")]
    if len(visible) < len(given):
        raise UnknownInstruction(f"the code takes {len(visible)} arguments, the launch gives {len(given)}.")
    for place, (name, value) in zip(visible, given, strict=False):
        if isinstance(value, Tensor):
            struct.pack_into("<q", segment, place.offset, addresses.get(name, 0))
        elif isinstance(value, float):
            struct.pack_into("<f" if place.size == 4 else "<d", segment, place.offset, value)
        else:
            struct.pack_into("<" + _FORMATS[place.size], segment, place.offset, int(value))
    for place in program.arguments:
        if place not in visible:
            if place.kind not in hidden:
                raise UnknownInstruction(f"the argument {place.kind} is unknown to the gfx11 emulator.")
            struct.pack_into("<" + _FORMATS[place.size], segment, place.offset, hidden[place.kind])
    return np.frombuffer(bytes(segment), np.uint8)


def _hidden_values(compiled: Compiled) -> dict[str, int]:
    """What the runtime passes behind the arguments: the shape of the grid and of a workgroup."""
    grid, group = (*compiled.launch.grid, 1, 1)[:3], (compiled.warps * compiled.lanes, 1, 1)
    values = {"hidden_none": 0, "hidden_grid_dims": 3, "hidden_dynamic_lds_size": compiled.shared_bytes}
    for axis, blocks, size in zip("xyz", grid, group, strict=True):
        values |= {f"hidden_block_count_{axis}": blocks, f"hidden_group_size_{axis}": size}
        values |= {f"hidden_remainder_{axis}": 0, f"hidden_global_offset_{axis}": 0}
    return values


def _bytes(tensor: Tensor) -> Array:
    """A view of the tensor's whole storage."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return storage.numpy()


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last: the kernel may touch no others."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((reach + 1) * tensor.element_size())
