"""Modules over the operators: W4A16Linear in place of nn.Linear, W4A16Experts in place of a fused expert block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .api import layout_of, pack, pack_experts
from .device import current_device
from .errors import BadInput, explain_mismatch
from .layouts import SKINNY, PackedWeight, pad_rows, unpack
from .ops import linear_call, moe_op
from .problem import ACT_NAMES


class _Packed(nn.Module):
    """The tensors of one PackedWeight as buffers, so that they move and save with the model.

    The dense copy (dense_cache.py) is for this weight, device and dtype: whatever changes one of them drops it, and
    neither a state dict nor a pickle nor a deep copy holds it.
    """

    codes: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    dense: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("codes", "scales", "zeros", "perm"):
            self.register_buffer(name, None)
        self.register_buffer("dense", None, persistent=False)
        self.dense_why = "not asked for"
        self.layout, self.n, self.k, self.group = "", 0, 0, 0

    def set(self, packed: PackedWeight) -> None:
        self.drop_dense("another weight was set")
        self._buffers.update(codes=packed.codes, scales=packed.scales, zeros=packed.zeros, perm=packed.perm)
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
            dense=self.dense,
        )

    def drop_dense(self, why: str) -> None:
        """Frees the dense copy, if there is one."""
        if self.dense is not None:
            self.dense, self.dense_why = None, f"dropped: {why}"

    def loaded(self) -> Tensor:
        codes = self._buffers["codes"]
        if codes is None:
            raise BadInput("this layer has no weight yet: load a checkpoint, or call set(packed) on it.")
        return codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        """`.to()`, `.half()` and the like: packs the weight anew where its kernels now read another layout."""
        copy, before = self.dense, self._place()
        self.dense = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._place()
        self.dense = copy
        if before is not None and after is not None and before != after:
            self.drop_dense("the layer was moved or cast")
            self._repack(*after)
        return self

    def _place(self) -> tuple[torch.device, torch.dtype] | None:
        return None if self.codes is None else (self.codes.device, self.scales.dtype)

    def _repack(self, device: torch.device, act: torch.dtype) -> None:
        if device.type not in ("cpu", "cuda") or act not in ACT_NAMES:
            return  # no kernel runs there: the call will say so
        weight, where = self.get(), current_device(device)
        why = self.dense_why
        if layout_of(weight, where, act) != self.layout:
            self.set(pack(unpack(weight.to("cpu")), device=device, act=act))
        elif self.layout == SKINNY and where.family == "gfx11":
            self.set(pad_rows(weight))  # a move packs the rows densely
        self.dense_why = why

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {**self._buffers, "dense": None}, "dense_why": "not asked for"}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in ("codes", "zeros"):
            have, found = self._buffers[name], state_dict.get(f"{prefix}{name}")
            if found is not None and (have is None or have.dtype != found.dtype):
                got = "none" if have is None else f"{have.dtype} of layout {self.layout}"
                then = "A state dict says no layout: save the module itself, or call set(packed) first."
                error_msgs.append(explain_mismatch(f"{prefix}{name}", got=got, wanted=found.dtype, then=then))
                return
        self.drop_dense("other weights were loaded")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


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
        held = self._buffers  # as an attribute of a module each would take a microsecond of every call
        return linear_call(
            x,
            self.loaded(),
            held["scales"],
            held["zeros"],
            held["perm"],
            self.bias,
            self.layout,
            self.n,
            self.k,
            self.group,
            held["dense"],
        )

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
        if w13.layout != w2.layout:
            wanted = f"that of w13, {w13.layout}"
            then = "Pack both by pack_experts."
            raise BadInput(explain_mismatch("layout of w2", got=w2.layout, wanted=wanted, then=then))
        self.w13.set(w13)
        self.w2.set(w2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W4A16Experts:
        """As of its halves, which may want different layouts, each for itself, where they have come to."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        w13, w2 = self.w13, self.w2
        if w13.codes is not None and w2.codes is not None and w13.layout != w2.layout:
            plain = (unpack(half.get().to("cpu")) for half in (w13, w2))
            self.set(*pack_experts(*plain, device=w13.codes.device, act=w13.scales.dtype))
        return self

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, k] int, top_k_weights [T, k] -> [T, H]."""
        w13, w2 = self.w13, self.w2
        upper, lower = w13._buffers, w2._buffers
        out: Tensor = moe_op(
            hidden_states,
            top_k_weights,
            top_k_index,
            w13.loaded(),
            upper["scales"],
            upper["zeros"],
            upper["perm"],
            w2.loaded(),
            lower["scales"],
            lower["zeros"],
            lower["perm"],
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
