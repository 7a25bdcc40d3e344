"""Other libraries' 4-bit kernels, beside which ours are timed: how each packs a weight, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..device import Device, installed
from ..problem import Problem
from ..weight import SYMMETRIC_ZERO, QuantizedWeight, pack_nibbles, unpack_nibbles

Multiply = Callable[[Tensor], Tensor]
Refuses = Callable[[Problem, Device], str | None]


def copied(tensor: Tensor) -> Tensor:
    """Another tensor of the same values and strides, padded rows included."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def needs(module: str) -> Refuses:
    """Why a kernel of `module` does not run here."""

    def unsupported(problem: Problem, device: Device) -> str | None:
        if not installed(module):
            return f"{module} is not installed"
        return None if device.arch.startswith("sm") else f"runs on NVIDIA GPUs, not on {device.arch}"

    return unsupported


def tinygemm(weight: QuantizedWeight, act: torch.dtype, copies: int) -> list[Multiply]:
    """torch's `_weight_int4pack_mm`: w = (q - 8) * scale + shift, 16 columns of K a tile."""
    codes = unpack_nibbles(weight.codes)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    scales = weight.scales.to(act)
    zeros = SYMMETRIC_ZERO if weight.zeros is None else weight.zeros.to(act)
    both = torch.stack([scales, (8 - zeros) * scales], dim=-1).transpose(0, 1).contiguous()
    pairs = [(packed, both), *((copied(packed), copied(both)) for _ in range(copies - 1))]

    def multiply(x: Tensor, words: Tensor, grid: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm(x, words, weight.group, grid)
        return out

    return [functools.partial(multiply, words=words, grid=grid) for words, grid in pairs]


def tinygemm_unsupported(problem: Problem, device: Device) -> str | None:
    if not device.arch.startswith("sm"):
        return f"runs on NVIDIA GPUs, not on {device.arch}"
    if problem.act != "bf16":
        return f"activations must be bf16, not {problem.act}"
    if problem.group not in (32, 64, 128, 256):
        return f"group must be 32, 64, 128 or 256, not {problem.group}"
    if problem.k % 1024 or problem.n % 8:
        return f"K must be a multiple of 1024 and N of 8, not {problem.k} and {problem.n}"
    return None


def gemlite(weight: QuantizedWeight, act: torch.dtype, copies: int) -> list[Multiply]:
    return [_gemlite_layer(weight, act) for _ in range(copies)]


def _gemlite_layer(weight: QuantizedWeight, act: torch.dtype) -> Multiply:
    import gemlite

    kind = gemlite.DType.BF16 if act == torch.bfloat16 else gemlite.DType.FP16
    n, k = weight.n, weight.k
    layer = gemlite.GemLiteLinear(
        4, group_size=weight.group, in_features=k, out_features=n, input_dtype=kind, output_dtype=kind
    )
    zeros = torch.full_like(weight.scales, SYMMETRIC_ZERO) if weight.zeros is None else weight.zeros.to(act)
    layer.pack(unpack_nibbles(weight.codes), weight.scales.to(act), zeros, None)
    return lambda x: layer(x)


def humming(weight: QuantizedWeight, act: torch.dtype, copies: int) -> list[Multiply]:
    return [humming_layer(weight, act) for _ in range(copies)]


def humming_layer(weight: QuantizedWeight, act: torch.dtype) -> Any:
    """A HummingLayer of a linear weight or of experts; it compiles its kernels at the first call."""
    from humming.layer import HummingLayer

    experts = weight.codes.shape[0] if weight.codes.dim() == 3 else None
    group = 0 if weight.group == weight.k else weight.group  # 0: a scale a row
    config = {"dtype": "uint4", "group_size": group, "has_zero_point": weight.has_zeros}
    layer = HummingLayer(
        shape_n=weight.n, shape_k=weight.k, weight_config=config, num_experts=experts, torch_dtype=act
    ).to(weight.codes.device)
    tensors = {"weight": weight.codes, "weight_scale": weight.scales.to(act)}
    if weight.zeros is not None:
        tensors["zero_point"] = pack_nibbles(weight.zeros.transpose(-1, -2)).transpose(-1, -2).contiguous()
    layer.load_from_tensors(tensors)
    layer.transform()
    return layer
