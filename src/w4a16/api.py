"""The functions a user calls: pack a weight for a device, multiply by it, load a model, explain a choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import layouts
from .device import Device, current_device
from .dispatch import layout_for
from .errors import BadInput, explain_mismatch
from .layouts import SKINNY, PackedWeight
from .ops import linear_call, moe_op
from .problem import ACT_NAMES, Problem
from .weight import QuantizedWeight


def pack(
    weight: QuantizedWeight, *, device: torch.device | str = "cpu", act: torch.dtype | None = None
) -> PackedWeight:
    """`weight` in the layout of `device`'s kernels, on that device, for activations of dtype `act`.

    act defaults to the dtype of the scales. Raises Unsupported when no kernel of the device can read the weight.
    """
    dtype = act or weight.scales.dtype
    if dtype not in ACT_NAMES:
        wanted = "bfloat16, float16 or float32"
        raise BadInput(explain_mismatch("act", got=act, wanted=wanted, then="Pass the dtype of the activations."))
    where = current_device(device)
    packed = layouts.pack(weight.to(device), layout=layout_of(weight, where, dtype), act=dtype)
    return layouts.pad_rows(packed) if packed.layout == SKINNY and where.family == "gfx11" else packed


def layout_of(weight: QuantizedWeight | PackedWeight, device: Device, act: torch.dtype) -> str:
    """The layout that `pack` gives this weight on `device` for activations of dtype `act`."""
    w = weight
    problem = Problem(m=1, n=w.n, k=w.k, group=w.group, act=ACT_NAMES[act], has_zeros=w.has_zeros)
    return layout_for(problem, device)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y [..., N] = x [..., K] @ W^T + bias, in x's dtype, accumulated in fp32.

    x must have the dtype the weight was packed for and be on its device; any strides. Raises BadInput when it is not,
    Unsupported when no kernel serves the call.
    """
    w = weight
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
    n13 = w2.k * (2 if gated else 1)
    if w13.layout != w2.layout or w13.n != n13 or w2.n != w13.k or w13.experts != w2.experts or not w13.experts:
        got = f"w13 [{w13.experts}, {w13.n}, {w13.k}] {w13.layout}, w2 [{w2.experts}, {w2.n}, {w2.k}] {w2.layout}"
        wanted = f"w13 [E, {'2I' if gated else 'I'}, H] and w2 [E, H, I] of one layout"
        raise BadInput(explain_mismatch("expert weights", got=got, wanted=wanted, then="Pack both alike."))
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
