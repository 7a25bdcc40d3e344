"""Packed weight layouts. Readers produce plain integers; only this package shuffles them.

Each layout is a pair of functions: `pack` gives (codes, scales, zeros) of a QuantizedWeight, `unpack` takes them back.
"""

from __future__ import annotations

import torch

from ..errors import Unsupported
from ..weight import QuantizedWeight
from .exllama import (
    EXLLAMA,
    EXLLAMA_ORDER,
    SKINNY,
    pack_exllama,
    pack_skinny,
    pad_rows,
    unpack_exllama,
    unpack_skinny,
)
from .int4pack import INT4PACK, INT4PACK_ROWS, int4pack_group, int4pack_rows, pack_int4pack, unpack_int4pack
from .packed import PackedWeight
from .sm90 import SM90, pack_sm90, unpack_sm90

__all__ = [
    "EXLLAMA",
    "EXLLAMA_ORDER",
    "INT4PACK",
    "INT4PACK_ROWS",
    "LAYOUTS",
    "SKINNY",
    "SM90",
    "PackedWeight",
    "int4pack_group",
    "int4pack_rows",
    "pack",
    "pad_rows",
    "unpack",
]

LAYOUTS = {
    EXLLAMA: (pack_exllama, unpack_exllama),
    SKINNY: (pack_skinny, unpack_skinny),
    INT4PACK: (pack_int4pack, unpack_int4pack),
    SM90: (pack_sm90, unpack_sm90),
}


def pack(weight: QuantizedWeight, *, layout: str = EXLLAMA, act: torch.dtype | None = None) -> PackedWeight:
    """`weight` in `layout`, its scales in `act` (the dtype of the activations; default the scales' own)."""
    if layout not in LAYOUTS:
        raise Unsupported(f"layout {layout!r} is unknown; w4a16 has {', '.join(LAYOUTS)}.")
    codes, scales, zeros = LAYOUTS[layout][0](weight, act or weight.scales.dtype)
    return PackedWeight(
        layout=layout,
        codes=codes,
        scales=scales,
        zeros=zeros,
        perm=weight.perm,
        n=weight.n,
        k=weight.k,
        group=weight.group,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """The plain weight that `pack` was given, its scales in the activation dtype."""
    codes, scales, zeros = LAYOUTS[packed.layout][1](packed)
    return QuantizedWeight(codes=codes, scales=scales, zeros=zeros, group=packed.group, perm=packed.perm)
