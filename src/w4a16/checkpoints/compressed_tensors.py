"""compressed-tensors, `pack-quantized`: `weight_packed` [N, K//8], `weight_scale` [N, G], `weight_shape` (N, K),
`weight_zero_point` [ceil(N/8), G] packed along N, `weight_g_idx` [K] in older files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import Unsupported
from ..weight import QuantizedWeight, pack_nibbles
from .base import Fields, Parts, Plan, Scheme, drop_trivial, plan_module, read_order, read_scales
from .bits import take_columns
from .compressed_tensors_config import describe, parse_groups, scheme_of
from .shards import FLOATS, Entry, Files

# scales of a quantised KV cache: w4a16 keeps the cache in 16 bits and needs none of them
CACHE = re.compile(r".*\.([qkv]_(scale|zero_point)|[qkv]_proj\.output_(scale|zero_point))$")


class CompressedTensors:
    name: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    )  # fmt: skip
    planned: ClassVar[tuple[str, ...]] = ("weight_shape",)

    def __init__(self, fields: Fields) -> None:
        self.groups = parse_groups(fields)
        self.cache = fields.values.get("kv_cache_scheme") is not None
        self.where = fields.where

    def scheme(self, module: str) -> Scheme:
        return scheme_of(module, self.groups, self.where)

    def required(self, module: str) -> tuple[str, ...]:
        scheme = self.scheme(module)
        names = ["weight_packed", "weight_scale", "weight_shape"]
        names += [] if scheme.symmetric else ["weight_zero_point"]
        return (*names, *(["weight_g_idx"] if scheme.act_order else []))

    def ignores(self, tensor: str) -> bool:
        return self.cache and CACHE.match(tensor) is not None

    def plan(self, module: str, parts: Parts, files: Files) -> Plan:
        codes, shape = parts["weight_packed"], parts["weight_shape"]
        codes.want("I32", (None, None))
        shape.want(("I64", "I32"), (2,))
        n, k = shape.integers(files)
        if codes.shape != (n, -(-k // 8)):
            wanted = f"[{n}, {-(-k // 8)}], as {shape.name} says ({n}, {k})"
            raise codes.bad("shape", got=list(codes.shape), wanted=wanted)
        plan = plan_module(codes, n, k, self.scheme(module))
        parts["weight_scale"].want(FLOATS, (n, plan.groups))
        if zeros := parts.get("weight_zero_point"):
            # early versions stored plain int8
            zeros.want(("I32", "I8"), (n if zeros.dtype == "I8" else -(-n // 8), plan.groups))
        if "weight_g_idx" in parts:
            parts["weight_g_idx"].want("I32", (k,))
        return plan

    def read(self, parts: Parts, plan: Plan) -> QuantizedWeight:
        codes = parts["weight_packed"].read()
        perm = read_order(parts["weight_g_idx"], plan) if "weight_g_idx" in parts else None
        zeros = None
        if "weight_zero_point" in parts:
            zeros = drop_trivial(_read_zeros(parts["weight_zero_point"], plan), plan.scheme)
        return QuantizedWeight(
            codes=codes if perm is None else take_columns(codes, perm),
            scales=read_scales(parts["weight_scale"]),
            zeros=zeros,
            group=plan.group,
            perm=perm,
        )

    @staticmethod
    def write(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
        if weight.perm is not None:
            raise Unsupported(
                "compressed-tensors: got an act-order weight, wanted its columns in order: version 0.20 of the "
                "library reads no weight_g_idx. Write GPTQ instead."
            )
        tensors = {
            "weight_packed": weight.codes.contiguous(),
            "weight_scale": weight.scales.contiguous(),
            "weight_shape": torch.tensor([weight.n, weight.k], dtype=torch.int64, device="cpu"),
        }
        if weight.zeros is not None:
            padded = torch.nn.functional.pad(weight.zeros, (0, 0, 0, -weight.n % 8))
            tensors["weight_zero_point"] = pack_nibbles(padded.t()).t().contiguous()
        return tensors

    @staticmethod
    def describe(scheme: Scheme, found: Mapping[Scheme, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
        return describe(scheme, found, ignore)


def _read_zeros(entry: Entry, plan: Plan) -> Tensor:
    stored = entry.read()
    if stored.dtype == torch.int32:
        pairs = stored.view(torch.uint8).view(*stored.shape, 4).transpose(1, 2)
        zeros = pairs.new_empty((len(stored), 4, 2, stored.shape[1]))
        low, high = zeros.unbind(2)
        torch.bitwise_and(pairs, 0xF, out=low)
        torch.bitwise_right_shift(pairs, 4, out=high)
        return zeros.view(-1, stored.shape[1])[: plan.n]
    if (stored < -8).any() or (stored > 7).any():
        raise entry.bad("values", got=f"{int(stored.min())} to {int(stored.max())}", wanted="-8 to 7")
    return (stored + 8).to(torch.uint8)
