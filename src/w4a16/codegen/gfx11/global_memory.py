"""VMEM: global, buffer and scratch loads and stores, and global atomics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import UnknownInstruction
from .operands import Operand, Reader, bits, u32, u64
from .program import Instruction
from .state import Gang
from .table import TABLE, Array, Step, destination
from .transfer import LOADS, STORES, fill, taken

U32, U64, I64, F32 = np.uint32, np.uint64, np.int64, np.float32


def _global_address(i: Instruction, vector: Operand, scalar: Operand) -> Reader:
    """uint64 [waves, 32]: a 64-bit VGPR pair, or a 64-bit SGPR pair plus a 32-bit VGPR."""
    offset = U64(i.modifiers.get("offset", 0) & (1 << 64) - 1)
    if scalar.kind == "off":
        address = u64(vector)
        return lambda gang: np.broadcast_to(address(gang) + offset, gang.active.shape)
    base, index = u64(scalar), u32(vector)
    return lambda gang: np.broadcast_to(base(gang) + index(gang).astype(U64) + offset, gang.active.shape)


def _buffer(i: Instruction, size: int) -> Callable[[Gang], tuple[Array, Array]]:
    """Addresses and which lanes are in range, of a raw buffer: others load 0 and store nothing."""
    if "idxen" in i.modifiers:
        raise UnknownInstruction(f"{i.text!r}: a structured buffer is unknown to the gfx11 emulator.")
    vector, resource, scalar = i.operands[1:]
    low, high, records = (bits(resource, part) for part in range(3))
    start = u32(scalar) if scalar.kind in ("s", "constant") else None
    index = u32(vector) if i.modifiers.get("offen") else None
    offset = I64(i.modifiers.get("offset", 0))

    def read(gang: Gang) -> tuple[Array, Array]:
        if (high(gang) >> U32(16) & U32(0x3FFF)).any():
            raise UnknownInstruction(f"{i.text!r}: a buffer with a stride is unknown to the gfx11 emulator.")
        at = np.zeros(gang.active.shape, I64) + offset
        if index:
            at = at + index(gang)
        in_range = (at + size <= records(gang)) & gang.active
        base = low(gang) | (high(gang) & U32(0xFFFF)).astype(U64) << U64(32)
        if start:
            base = base + start(gang).astype(U64)
        return at.astype(U64) + base, in_range

    return read


def _scratch_address(i: Instruction, vector: Operand, scalar: Operand) -> Reader:
    index = u32(vector) if vector.kind == "v" else None
    base = u32(scalar) if scalar.kind == "s" else None
    offset = I64(i.modifiers.get("offset", 0))

    def read(gang: Gang) -> Array:
        at = np.zeros(gang.active.shape, I64) + offset
        at = at + index(gang) if index else at
        return at + base(gang) if base else at

    return read


def _global_load(size: int, how: Any) -> Any:
    def build(i: Instruction) -> Step:
        address, into = _global_address(i, *i.operands[1:]), destination(i)
        return lambda gang: fill(gang, into, gang.memory.load(address(gang), gang.active, size), how)

    return build


def _global_store(size: int, shift: int) -> Any:
    def build(i: Instruction) -> Step:
        vector, source, scalar = i.operands
        address, data = _global_address(i, vector, scalar), taken(source, size, shift)
        return lambda gang: gang.memory.store(address(gang), gang.active, data(gang))

    return build


def _buffer_load(size: int, how: Any) -> Any:
    def build(i: Instruction) -> Step:
        locate, into = _buffer(i, size), destination(i)

        def step(gang: Gang) -> None:
            address, in_range = locate(gang)
            data = gang.memory.load(address, in_range, size)
            data[~in_range] = 0
            fill(gang, into, data, how)

        return step

    return build


def _buffer_store(size: int, shift: int) -> Any:
    def build(i: Instruction) -> Step:
        locate, data = _buffer(i, size), taken(i.operands[0], size, shift)

        def step(gang: Gang) -> None:
            gang.memory.store(*locate(gang), data(gang))

        return step

    return build


def _scratch_load(size: int, how: Any) -> Any:
    def build(i: Instruction) -> Step:
        address, into = _scratch_address(i, *i.operands[1:]), destination(i)
        return lambda gang: fill(gang, into, gang.scratch_load(address(gang), size), how)

    return build


def _scratch_store(size: int, shift: int) -> Any:
    def build(i: Instruction) -> Step:
        vector, source, scalar = i.operands
        address, data = _scratch_address(i, vector, scalar), taken(source, size, shift)
        return lambda gang: gang.scratch_store(address(gang), data(gang))

    return build


for _name, _load in LOADS.items():
    TABLE[f"global_load_{_name}"] = _global_load(*_load)
    TABLE[f"buffer_load_{_name}"] = _buffer_load(*_load)
    TABLE[f"scratch_load_{_name}"] = _scratch_load(*_load)
for _name, _store in STORES.items():
    TABLE[f"global_store_{_name}"] = _global_store(*_store)
    TABLE[f"buffer_store_{_name}"] = _buffer_store(*_store)
    TABLE[f"scratch_store_{_name}"] = _scratch_store(*_store)

# new value of the word in memory, from the old one and the data registers
_ATOMICS: dict[str, tuple[Callable[..., Any], int]] = {
    "swap_b32": (lambda old, new: new, 1),
    "add_u32": (lambda old, new: old + new, 1),
    "add_f32": (lambda old, new: (old.view(F32) + new.view(F32)).view(U32), 1),
    "cmpswap_b32": (lambda old, new, expected: np.where(old == expected, new, old), 2),
}


def _atomic(f: Callable[..., Any], registers: int) -> Any:
    """Lane after lane; the old value is returned with glc."""

    def build(i: Instruction) -> Step:
        vector, source, scalar = i.operands[-3:]
        address, into = _global_address(i, vector, scalar), destination(i) if len(i.operands) == 4 else None
        data = [bits(source, part) for part in range(registers)]

        def step(gang: Gang) -> None:
            at, words = address(gang), [word(gang).copy() for word in data]
            old = np.zeros(gang.active.shape, U32)
            for lane in zip(*gang.active.nonzero(), strict=True):
                word = gang.memory.word(int(at[lane]))
                old[lane] = word[0]
                word[:] = f(word, *(given[lane] for given in words))
            if into is not None:
                gang.write(into, old)

        return step

    return build


TABLE.update({f"global_atomic_{name}": _atomic(*entry) for name, entry in _ATOMICS.items()})
