"""Modules over the operators: W4A16Linear in place of nn.Linear, W4A16Experts in place of a fused expert block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import BadInput
from .layouts import PackedWeight
from .ops import linear_op, moe_op


class _Packed(nn.Module):
    """The tensors of one PackedWeight as buffers, so that they move and save with the model."""

    codes: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("codes", "scales", "zeros", "perm"):
            self.register_buffer(name, None)
        self.layout, self.n, self.k, self.group = "", 0, 0, 0

    def set(self, packed: PackedWeight) -> None:
        self.codes, self.scales, self.zeros, self.perm = packed.codes, packed.scales, packed.zeros, packed.perm
        self.layout, self.n, self.k, self.group = packed.layout, packed.n, packed.k, packed.group

    def get(self) -> PackedWeight:
        """The record again; raises BadInput while no weight is loaded."""
        return PackedWeight(
            layout=self.layout,
            codes=self.loaded(),
            scales=self.scales,
            zeros=self.zeros,
            perm=self.perm,
            n=self.n,
            k=self.k,
            group=self.group,
        )

    def loaded(self) -> Tensor:
        if self.codes is None:
            raise BadInput("this layer has no weight yet: load a checkpoint, or call set(packed) on it.")
        return self.codes


class W4A16Linear(_Packed):
    """y [..., N] = x [..., K] @ W^T + bias over a packed 4-bit weight.

    Built empty (`bias` then names a parameter to be filled), or from a PackedWeight with `W4A16Linear.of`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, packed: PackedWeight, bias: Tensor | None = None) -> W4A16Linear:
        layer = cls(packed.k, packed.n)
        layer.set(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = linear_op(
            x,
            self.loaded(),
            self.scales,
            self.zeros,
            self.perm,
            self.bias,
            self.layout,
            self.n,
            self.k,
            self.group,
        )
        return out

    def extra_repr(self) -> str:
        kind = "asym" if self.zeros is not None else "sym"
        return f"{self.in_features}, {self.out_features}, group={self.group}, {kind}, layout={self.layout or None}"


class W4A16Experts(nn.Module):
    """A routed expert layer: sum over slots of topk_weights * down(act(gate) * up).

    w13 is [E, 2I, H] with gate above up ([E, I, H] when not gated), w2 is [E, H, I]. `activation` is a key of
    reference.ACTIVATIONS. Ids outside 0..E-1 are skipped (expert parallelism).
    """

    def __init__(self, num_experts: int, *, activation: str = "silu", gated: bool = True):
        super().__init__()
        self.num_experts, self.activation, self.gated = num_experts, activation, gated
        self.w13, self.w2 = _Packed(), _Packed()

    def set(self, w13: PackedWeight, w2: PackedWeight) -> None:
        self.w13.set(w13)
        self.w2.set(w2)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, k] int, top_k_weights [T, k] -> [T, H]."""
        w13, w2 = self.w13, self.w2
        out: Tensor = moe_op(
            hidden_states,
            top_k_weights,
            top_k_index,
            w13.loaded(),
            w13.scales,
            w13.zeros,
            w13.perm,
            w2.loaded(),
            w2.scales,
            w2.zeros,
            w2.perm,
            None,
            w13.layout,
            w13.k,
            w2.k,
            w13.group,
            w2.group,
            self.activation,
            self.gated,
            False,
        )
        return out

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, activation={self.activation}, gated={self.gated}"
