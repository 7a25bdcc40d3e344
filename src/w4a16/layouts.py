"""Packed weight layouts as data. Readers produce plain integers; only this module shuffles them.

EXLLAMA is [N, K//8] int32 whose nibble i holds value EXLLAMA_ORDER[i] of its word, so that
(word >> 4p) & 0x000F000F is the adjacent pair (2p, 2p+1) as two 16-bit lanes. Source: the ExLlama kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import Unsupported
from .weight import CODES_PER_WORD, QuantizedWeight

EXLLAMA = "EXLLAMA"
INT4PACK = "INT4PACK"
EXLLAMA_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight in the layout of one device's kernels: the one resident copy.

    codes, scales, zeros  tensors whose meaning the layout defines; zeros None when symmetric
    perm                  int64 [..., K] or None (act-order): column j multiplies input channel perm[j]
    n, k, group           of the weight as the checkpoint has it
    The activation dtype is the scales'.
    """

    layout: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    n: int
    k: int
    group: int

    @property
    def act(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def has_zeros(self) -> bool:
        return self.zeros is not None

    @property
    def experts(self) -> int:
        """Number of experts, 0 for a plain linear weight."""
        return self.codes.shape[0] if self.codes.ndim == 3 else 0

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.perm)
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same record with every tensor on `device`."""
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            perm=None if self.perm is None else self.perm.to(device),
        )


def reorder_words(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """Words of sequential nibbles to words whose nibble i holds value order[i]; int32 in, int32 out, same shape."""
    out = torch.zeros_like(words)
    for nibble, index in enumerate(order):
        out |= ((words >> (4 * index)) & 0xF) << (4 * nibble)
    return out


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(CODES_PER_WORD))


def pack(weight: QuantizedWeight, *, layout: str = EXLLAMA, act: torch.dtype | None = None) -> PackedWeight:
    """`weight` in `layout`, its scales in `act` (the dtype of the activations; default the scales' own)."""
    _known(layout)
    return PackedWeight(
        layout=layout,
        codes=reorder_words(weight.codes, EXLLAMA_ORDER),
        scales=weight.scales.to(act or weight.scales.dtype).contiguous(),
        zeros=None if weight.zeros is None else weight.zeros.contiguous(),
        perm=weight.perm,
        n=weight.n,
        k=weight.k,
        group=weight.group,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """The plain weight that `pack` was given, its scales in the activation dtype."""
    _known(packed.layout)
    return QuantizedWeight(
        codes=reorder_words(packed.codes, inverse(EXLLAMA_ORDER)),
        scales=packed.scales,
        zeros=packed.zeros,
        group=packed.group,
        perm=packed.perm,
    )


def _known(layout: str) -> None:
    if layout != EXLLAMA:
        raise Unsupported(f"layout {layout!r} is unknown; w4a16 has {EXLLAMA}.")
