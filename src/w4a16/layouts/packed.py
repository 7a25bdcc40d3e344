"""PackedWeight: a weight in the layout of one device's kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight in the layout of one device's kernels: the one resident copy.

    codes, scales, zeros  tensors whose meaning the layout defines; zeros None when symmetric
    perm                  int64 [..., K] or None (act-order): column j multiplies input channel perm[j]
    n, k, group           of the weight as the checkpoint has it
    dense                 [N, K] or None: a dequantised copy for prefill, columns as in codes (dense_cache.py)
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
    dense: Tensor | None = None

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
        tensors = (self.codes, self.scales, self.zeros, self.perm)  # the copy is counted apart
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same record with every tensor on `device`."""
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            perm=None if self.perm is None else self.perm.to(device),
            dense=None,  # made for the device it lies on, under that one's budget
        )

    def expert(self, index: int) -> PackedWeight:
        """One expert's weight, as a view."""
        return replace(
            self,
            codes=self.codes[index],
            scales=self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
            perm=None if self.perm is None else self.perm[index],
        )
