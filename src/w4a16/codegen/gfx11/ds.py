"""DS: LDS loads and stores, single and paired, and the permutations that go through LDS hardware."""

from __future__ import annotations

from typing import Any

import numpy as np

from .operands import u32
from .program import Instruction
from .state import Gang
from .table import TABLE, Step, define, destination
from .transfer import LOADS, STORES, fill, taken

U32 = np.uint32


def _load(size: int, how: Any) -> Any:
    def build(i: Instruction) -> Step:
        address, into, offset = u32(i.operands[1]), destination(i), U32(i.modifiers.get("offset", 0))
        return lambda gang: fill(gang, into, gang.lds.load(gang, address(gang) + offset, size), how)

    return build


def _store(size: int, shift: int) -> Any:
    def build(i: Instruction) -> Step:
        address, data = u32(i.operands[0]), taken(i.operands[1], size, shift)
        offset = U32(i.modifiers.get("offset", 0))
        return lambda gang: gang.lds.store(gang, address(gang) + offset, data(gang))

    return build


def _offsets(i: Instruction, unit: int) -> list[Any]:
    return [U32(i.modifiers.get(name, 0) * unit) for name in ("offset0", "offset1")]


def _load_pair(size: int, stride: int) -> Any:
    def build(i: Instruction) -> Step:
        address, into, offsets = u32(i.operands[1]), destination(i), _offsets(i, size * stride)

        def step(gang: Gang) -> None:
            data = [gang.lds.load(gang, address(gang) + offset, size) for offset in offsets]
            fill(gang, into, np.concatenate(data, -1), None)

        return step

    return build


def _store_pair(size: int, stride: int) -> Any:
    def build(i: Instruction) -> Step:
        address, offsets = u32(i.operands[0]), _offsets(i, size * stride)
        data = [taken(operand, size, 0) for operand in i.operands[1:]]

        def step(gang: Gang) -> None:
            for offset, read in zip(offsets, data, strict=True):
                gang.lds.store(gang, address(gang) + offset, read(gang))

        return step

    return build


for _name, _entry in LOADS.items():
    TABLE[f"ds_load_{_name}"] = _load(*_entry)
for _name, _write in STORES.items():
    TABLE[f"ds_store_{_name}"] = _store(*_write)
for _bits, _size in (("b32", 4), ("b64", 8)):
    for _form, _stride in (("2addr", 1), ("2addr_stride64", 64)):
        TABLE[f"ds_load_{_form}_{_bits}"] = _load_pair(_size, _stride)
        TABLE[f"ds_store_{_form}_{_bits}"] = _store_pair(_size, _stride)


@define("ds_bpermute_b32")
def _pull(i: Instruction) -> Step:
    """Each lane reads the lane that its address names; inactive lanes give 0."""
    into, address, source, offset = (
        destination(i),
        u32(i.operands[1]),
        i.operands[2].index,
        i.modifiers.get("offset", 0),
    )

    def step(gang: Gang) -> None:
        lanes = np.broadcast_to((address(gang) + U32(offset)) >> U32(2) & U32(31), gang.active.shape)
        given = np.where(gang.active, gang.v[source], U32(0))
        gang.write(into, np.take_along_axis(given, lanes.astype(np.int64), 1))

    return step


@define("ds_swizzle_b32")
def _swizzle(i: Instruction) -> Step:
    """Bit 15 of the offset: permutes quads; else lane = ((lane & and) | or) ^ xor, five bits each."""
    into, source, control = destination(i), i.operands[1].index, i.modifiers.get("offset", 0)
    lane = np.arange(32)
    if control >> 15:
        lanes = lane & ~3 | control >> 2 * (lane & 3) & 3
    else:
        lanes = (lane & (control & 31) | control >> 5 & 31) ^ (control >> 10 & 31)

    def step(gang: Gang) -> None:
        gang.write(into, np.where(gang.active, gang.v[source], U32(0))[:, lanes])

    return step
