"""What loads and stores of every memory share: how bytes fill registers, and which bytes registers give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import Operand, bits
from .state import Gang
from .table import Array

U32 = np.uint32

# suffix -> bytes, how they fill the register: words, a type that widens to 32 bits, or (type, high half)
LOADS: dict[str, tuple[int, Any]] = {
    "u8": (1, np.uint8),
    "i8": (1, np.int8),
    "u16": (2, np.uint16),
    "i16": (2, np.int16),
    "b32": (4, None),
    "b64": (8, None),
    "b96": (12, None),
    "b128": (16, None),
}
for _size, _name, _type in ((2, "b16", np.uint16), (1, "u8", np.uint8), (1, "i8", np.int8)):
    _ds = "u16" if _name == "b16" else _name
    LOADS[f"d16_{_name}"] = LOADS[f"{_ds}_d16"] = (_size, (_type, False))
    LOADS[f"d16_hi_{_name}"] = LOADS[f"{_ds}_d16_hi"] = (_size, (_type, True))

# suffix -> bytes, shift of the register's bits
STORES: dict[str, tuple[int, int]] = {
    "b8": (1, 0),
    "b16": (2, 0),
    "b32": (4, 0),
    "b64": (8, 0),
    "b96": (12, 0),
    "b128": (16, 0),
    "d16_hi_b8": (1, 16),
    "d16_hi_b16": (2, 16),
    "b8_d16_hi": (1, 16),
    "b16_d16_hi": (2, 16),
}


def fill(gang: Gang, index: int, data: Array, how: Any) -> None:
    """uint8 [waves, 32, size] into registers from `index`."""
    if how is None:
        words = data.view(U32)
        for part in range(words.shape[-1]):
            gang.write(index + part, words[..., part])
    elif isinstance(how, tuple):
        kind, high = how
        gang.write_half(index, data.view(kind)[..., 0].astype(np.int32).astype(np.uint16), high)
    else:
        gang.write(index, data.view(how)[..., 0].astype(np.int32).view(U32))


def taken(operand: Operand, size: int, shift: int) -> Callable[[Gang], Array]:
    """Reads uint8 [waves, 32, size] from the registers of a store."""
    words = [bits(operand, part) for part in range(max(1, size // 4))]
    shift = 16 if operand.half == "h" else shift

    def read(gang: Gang) -> Array:
        held = [np.broadcast_to(word(gang), gang.active.shape) for word in words]
        if size < 4:
            held = [held[0] >> U32(shift)]
        return np.ascontiguousarray(np.stack(held, -1)).view(np.uint8)[..., :size]

    return read
