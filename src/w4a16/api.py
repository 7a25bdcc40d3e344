"""The functions a user calls: pack a weight for a device, multiply by it, load a model, explain a choice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import layouts
from .device import Device, current_device
from .dispatch import layout_for
from .errors import BadInput, explain_mismatch
from .layouts import EXLLAMA, SKINNY, SM90, PackedWeight
from .layouts.sm90 import TILE, split_sm90
from .ops import linear_call, moe_op
from .problem import ACT_NAMES, Problem
from .weight import QuantizedWeight, concat_rows


def pack(
    weight: QuantizedWeight,
    *,
    device: torch.device | str = "cpu",
    act: torch.dtype | None = None,
    layout: str | None = None,
) -> PackedWeight:
    """`weight` in the layout of `device`'s kernels, on that device, for activations of dtype `act`.

    act defaults to the dtype of the scales, layout to that of the kernel that serves few rows. Raises Unsupported when
    no kernel of the device can read the weight. For the two weights of an expert layer: `pack_experts`.
    """
    dtype, where = _act(weight, act), current_device(device)
    packed = layouts.pack(weight.to(device), layout=layout or layout_of(weight, where, dtype), act=dtype)
    return layouts.pad_rows(packed) if packed.layout == SKINNY and where.family == "gfx11" else packed


def pack_all(
    weights: Sequence[QuantizedWeight], *, device: torch.device | str = "cpu", act: torch.dtype | None = None
) -> list[PackedWeight]:
    """`pack` of each; on Hopper those of one K and kind at once, as a weight costs launches there more than rows."""
    where, alike = current_device(device), defaultdict(list)
    for at, w in enumerate(weights):
        whole = w.n % TILE == 0 and not w.experts and w.perm is None
        alike[(w.k, w.group, w.scales.dtype, w.has_zeros) if whole else at].append(at)
    packed: dict[int, PackedWeight] = {}
    for several in alike.values():
        first = weights[several[0]]
        if len(several) == 1 or layout_of(first, where, _act(first, act)) != SM90:
            packed |= {at: pack(weights[at], device=device, act=act) for at in several}
            continue
        joined = pack(concat_rows([weights[at] for at in several]), device=device, act=act, layout=SM90)
        packed |= zip(several, split_sm90(joined, [weights[at].n for at in several]), strict=True)
    return [packed[at] for at in range(len(weights))]


def pack_experts(
    w13: QuantizedWeight,
    w2: QuantizedWeight,
    *,
    device: torch.device | str = "cpu",
    act: torch.dtype | None = None,
) -> tuple[PackedWeight, PackedWeight]:
    """Both weights of an expert layer in one layout; otherwise as `pack`."""
    dtype, where = _act(w13, act), current_device(device)
    layout = experts_layout(_packing(w13, dtype), _packing(w2, dtype), where)
    return pack(w13, device=device, act=dtype, layout=layout), pack(w2, device=device, act=dtype, layout=layout)


def _packed(weight: PackedWeight, *, experts: bool) -> PackedWeight:
    """That weight. Raises BadInput where it is another thing, or of experts where it should not be."""
    if isinstance(weight, PackedWeight) and (weight.codes.ndim == 3) == experts:
        return weight
    wanted = "PackedWeight of experts [E, N, K]" if experts else "PackedWeight of one linear layer [N, K]"
    got = type(weight).__name__
    if isinstance(weight, PackedWeight):
        got += f" of {weight.experts} experts" if weight.experts else " of one linear layer"
    then = "Pack it by w4a16.pack_experts" if experts else "Pack it by w4a16.pack, or call w4a16.moe for experts"
    raise BadInput(explain_mismatch("weight", got=got, wanted=wanted, then=f"{then}."))


def _act(weight: QuantizedWeight, act: torch.dtype | None) -> torch.dtype:
    dtype = act or weight.scales.dtype
    if dtype not in ACT_NAMES:
        wanted = "bfloat16, float16 or float32"
        raise BadInput(explain_mismatch("act", got=act, wanted=wanted, then="Pass the dtype of the activations."))
    return dtype


def layout_of(weight: QuantizedWeight | PackedWeight, device: Device, act: torch.dtype) -> str:
    """The layout that `pack` gives this weight on `device` for activations of dtype `act`."""
    return layout_for(_packing(weight, act), device)


def experts_layout(w13: Problem, w2: Problem, device: Device) -> str:
    """The layout for both weights of an expert layer, given as problems: the device's plainest where they differ."""
    first, second = layout_for(w13, device), layout_for(w2, device)
    return first if first == second else EXLLAMA if device.arch == "cpu" else SKINNY


def _packing(weight: QuantizedWeight | PackedWeight, act: torch.dtype) -> Problem:
    """One row of x: what the layout of a weight is chosen by."""
    w = weight
    return Problem(
        m=1,
        n=w.n,
        k=w.k,
        group=w.group,
        act=ACT_NAMES[act],
        has_zeros=w.has_zeros,
        experts=w.experts,
        top_k=1 if w.experts else 0,
    )


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y [..., N] = x [..., K] @ W^T + bias, in x's dtype, accumulated in fp32.

    x must have the dtype the weight was packed for and be on its device; any strides. Raises BadInput when it is not,
    Unsupported when no kernel serves the call.
    """
    w = _packed(weight, experts=False)
    return linear_call(x, w.codes, w.scales, w.zeros, w.perm, bias, w.layout, w.n, w.k, w.group, w.dense)


def moe(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    weight_input: bool = False,
    expert_map: Tensor | None = None,
) -> Tensor:
    """y [T, H]: the expert layer of x [T, H] given its routing.

    w13 [E, 2I, H] holds gate above up (gated=False: [E, I, H]), w2 [E, H, I]. topk_weights and topk_ids are [T, top_k].
    expert_map [E of the model] gives the local index of each expert, -1 for one that lives elsewhere; it adds nothing.
    weight_input multiplies the input by the router weight, not the output (top_k 1 only).
    """
    w13, w2 = _packed(w13, experts=True), _packed(w2, experts=True)
    n13 = w2.k * (2 if gated else 1)
    if w13.layout != w2.layout or w13.n != n13 or w2.n != w13.k or w13.experts != w2.experts:
        got = f"w13 [{w13.experts}, {w13.n}, {w13.k}] {w13.layout}, w2 [{w2.experts}, {w2.n}, {w2.k}] {w2.layout}"
        wanted = f"w13 [E, {'2I' if gated else 'I'}, H] and w2 [E, H, I] of one layout"
        then = "Pack both alike, by pack_experts."
        raise BadInput(explain_mismatch("expert weights", got=got, wanted=wanted, then=then))
    out: Tensor = moe_op(
        x,
        topk_weights,
        topk_ids,
        w13.codes,
        w13.scales,
        w13.zeros,
        w13.perm,
        w2.codes,
        w2.scales,
        w2.zeros,
        w2.perm,
        expert_map,
        w13.layout,
        w13.k,
        w2.k,
        w13.group,
        w2.group,
        activation,
        gated,
        weight_input,
    )
    return out


def load(
    path_or_id: str,
    device: torch.device | str = "cpu",
    *,
    dense_cache: str | None = None,
    memory_utilization: float | None = None,
    **kwargs: Any,
) -> Any:
    """A transformers causal LM from a W4A16 checkpoint (AWQ, GPTQ, compressed-tensors), on w4a16's layers.

    path_or_id is a folder or a Hugging Face Hub id; kwargs go to `AutoModelForCausalLM.from_pretrained`.
    dense_cache (off, soft, hard) makes dequantised copies for prefill where they pay, while they fit into
    memory_utilization of the memory; default W4A16_DENSE_CACHE, else off. `model.w4a16_report()` lists them.
    """
    from .dense_cache import asked
    from .plugins.transformers import load_model

    with asked(dense_cache, memory_utilization):
        return load_model(path_or_id, device, **kwargs)
