"""What each checkpoint format's tensors are in plain codes, scales and zero points, and which layers w4a16 serves.

vLLM hands a plugin one tensor after another, under its name on disk, whole, to be cut into tensor-parallel shards.
Every tensor is brought into its plain form first, [N, ...] with K contiguous and zero points unpacked, so that one rule
cuts all formats: rows for N, columns for K. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checkpoints import Scheme
from ..checkpoints.awq import INVERSE, ORDER
from ..checkpoints.base import CHANNEL, drop_trivial
from ..checkpoints.bits import take_columns, transpose, transpose_nibbles
from ..checkpoints.gptq import ONES
from ..device import current_device
from ..dispatch import layout_for
from ..errors import BadCheckpoint, Unsupported, explain_mismatch
from ..problem import ACT_NAMES, Problem
from ..weight import CODES_PER_WORD, QuantizedWeight, unpack_nibbles

Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The companion tensors of a module by their names on disk, and the way from each to its plain form.

    order    act-order: the group of every input channel, [K]
    ignored  tensors that are on disk and say nothing that the others do not, each with its dtype there
    """

    codes: tuple[str, Convert]
    scales: tuple[str, Convert]
    zeros: tuple[str, Convert] | None
    order: str | None = None
    ignored: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        named = [each[0] for each in (self.codes, self.scales, self.zeros) if each is not None]
        return [*named, *([] if self.order is None else [self.order]), *self.ignored]


def _as_it_is(stored: Tensor) -> Tensor:
    return stored


def _turned(stored: Tensor) -> Tensor:
    return stored.t()


def _packed_along_rows(stored: Tensor) -> Tensor:
    """int32 [ceil(N/8), G] to uint8 [N rounded up to 8, G]."""
    return unpack_nibbles(stored.t().contiguous()).t()


def _awq_codes(stored: Tensor) -> Tensor:
    return transpose_nibbles(stored.cpu(), INVERSE)


def _awq_zeros(stored: Tensor) -> Tensor:
    return unpack_nibbles(stored, ORDER).t()


def _gptq_codes(stored: Tensor) -> Tensor:
    return transpose(stored.cpu())


def compressed_tensors(*, symmetric: bool) -> Stored:
    return Stored(
        codes=("weight_packed", _as_it_is),
        scales=("weight_scale", _as_it_is),
        zeros=None if symmetric else ("weight_zero_point", _packed_along_rows),
        ignored={"weight_shape": torch.int64},
    )


def awq(*, stores_zeros: bool) -> Stored:
    return Stored(
        codes=("qweight", _awq_codes),
        scales=("scales", _turned),
        zeros=("qzeros", _awq_zeros) if stores_zeros else None,
    )


def gptq(*, version: int, act_order: bool, reads_order: bool) -> Stored:
    """`reads_order`: some layer of the model is in act-order, so that vLLM hands over every `g_idx`."""
    offset = ONES if version == 1 else 0
    return Stored(
        codes=("qweight", _gptq_codes),
        scales=("scales", _turned),
        zeros=("qzeros", lambda stored: unpack_nibbles(stored + offset).t()),
        order="g_idx" if act_order else None,
        ignored={"g_idx": torch.int32} if reads_order and not act_order else {},
    )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One rank's part of a weight: [n, k] of a layer whose whole input is `whole_k` wide."""

    n: int
    k: int
    whole_k: int

    def group(self, scheme: Scheme) -> int:
        """Columns of this part that share a scale; a group as wide as the layer's input is cut with it."""
        return self.k if scheme.group in (CHANNEL, self.whole_k) else scheme.group

    def groups(self, scheme: Scheme) -> int:
        return self.k // self.group(scheme)

    def shares_scales(self, scheme: Scheme) -> bool:
        """Whether every rank holds the same scales: the input is cut inside a group."""
        return self.k < self.whole_k and scheme.group in (CHANNEL, self.whole_k)


def refusal(cut: Cut, scheme: Scheme, act: torch.dtype, device: torch.device) -> str | None:
    """Why w4a16 does not serve this part of a layer, in one sentence; None when it does."""
    group = cut.whole_k if scheme.group == CHANNEL else scheme.group
    if act not in ACT_NAMES:
        return f"activations are {act}, not bfloat16, float16 or float32"
    if cut.whole_k % group:
        return f"its input of {cut.whole_k} columns is not a multiple of the group {group}"
    if scheme.act_order and cut.k < cut.whole_k:
        return (
            f"act-order (desc_act) does not split along K={cut.whole_k}: columns of one group lie all over the input; "
            "use one rank, or quantise without desc_act"
        )
    step = CODES_PER_WORD if group == cut.whole_k else group
    if cut.k % step:
        return (
            f"its shard of {cut.k} of K={cut.whole_k} columns does not end on a boundary of {step}; "
            "use fewer tensor-parallel ranks"
        )
    try:
        layout(cut, scheme, act, device)
    except Unsupported as error:
        return str(error).split("\n")[0]
    return None


def layout(cut: Cut, scheme: Scheme, act: torch.dtype, device: torch.device) -> str:
    """The layout that this part is packed in; raises Unsupported when no kernel of the device reads it."""
    group, zeros = cut.group(scheme), not scheme.symmetric
    problem = Problem(m=1, n=cut.n, k=cut.k, group=group, act=ACT_NAMES[act], has_zeros=zeros)
    return layout_for(problem, current_device(device))


def in_order(cut: Cut, scheme: Scheme, *lead: int) -> Tensor:
    """The g_idx of columns in order, int32 [*lead, K]: what a layer holds until its own is loaded."""
    groups = torch.arange(cut.k, dtype=torch.int32) // cut.group(scheme)
    return groups.expand(*lead, cut.k).clone()


def weight_of(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None, *, scheme: Scheme, group: int
) -> QuantizedWeight:
    """One plain weight, its columns sorted by group when it is in act-order."""
    perm = None if g_idx is None else order_of(g_idx, group)
    if perm is not None:
        codes = take_columns(codes.cpu(), perm.cpu()).to(codes.device)
    return QuantizedWeight(
        codes=codes,
        scales=scales,
        zeros=None if zeros is None else drop_trivial(zeros, scheme),
        group=group,
        perm=perm,
    )


def experts_of(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None, *, scheme: Scheme, group: int
) -> QuantizedWeight:
    """E plain weights as one; g_idx [E, K], or [E, 2, K] where gate and up lie one above the other."""
    if zeros is not None:
        zeros = drop_trivial(zeros, scheme)
    if g_idx is None:
        return QuantizedWeight(codes=codes, scales=scales, zeros=zeros, group=group)
    if g_idx.ndim == 3:
        if not torch.equal(g_idx[:, 0], g_idx[:, 1]):
            raise Unsupported(
                "got gate and up projections with different act-order permutations, wanted one for both: w4a16 reads "
                "their input once. Quantise without desc_act."
            )
        g_idx = g_idx[:, 0]
    orders = [order_of(row, group) for row in g_idx]
    if all(order is None for order in orders):
        return QuantizedWeight(codes=codes, scales=scales, zeros=zeros, group=group)
    columns = torch.arange(codes.shape[-1] * CODES_PER_WORD, device=codes.device)
    perm = torch.stack([columns if order is None else order for order in orders])
    sorted_codes = [take_columns(one.cpu(), order.cpu()) for one, order in zip(codes, perm, strict=True)]
    codes = torch.stack(sorted_codes).to(codes.device)
    return QuantizedWeight(codes=codes, scales=scales, zeros=zeros, group=group, perm=perm)


def order_of(g_idx: Tensor, group: int) -> Tensor | None:
    """The permutation that sorts the columns by group; None when they are in order. Raises at unequal groups."""
    groups = g_idx.long()
    if torch.equal(groups, torch.arange(len(groups), device=groups.device) // group):
        return None
    counts = groups.clamp(min=0).bincount(minlength=len(groups) // group)
    if int(groups.min()) < 0 or (counts != group).any():
        got = f"groups of {sorted(set(counts.tolist()))} columns"
        raise BadCheckpoint(
            explain_mismatch("g_idx", got=got, wanted=f"{group} each", then="Download the checkpoint again.")
        )
    return groups.argsort(stable=True)
