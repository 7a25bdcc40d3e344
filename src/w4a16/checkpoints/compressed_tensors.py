"""compressed-tensors, `pack-quantized`: `weight_packed` [N, K//8], `weight_scale` [N, G], `weight_shape` (N, K),
`weight_zero_point` [ceil(N/8), G] packed along N, `weight_g_idx` [K] in older files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import Unsupported
from ..weight import QuantizedWeight, pack_nibbles, unpack_nibbles
from .base import CHANNEL, SEE_CONFIG, Fields, Parts, Plan, Scheme, drop_trivial, plan_module, read_order, read_scales
from .bits import take_columns
from .shards import FLOATS, Entry, bad

PACKED = "pack-quantized"
ORDERED = ("group", "dynamic", True)  # spellings of "columns of a group are not neighbours"
# scales of a quantised KV cache: w4a16 keeps the cache in 16 bits and needs none of them
CACHE = re.compile(r".*\.([qkv]_(scale|zero_point)|[qkv]_proj\.output_(scale|zero_point))$")


@dataclass(frozen=True)
class _Group:
    names: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    scheme: Scheme


class CompressedTensors:
    name: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    )  # fmt: skip

    def __init__(self, fields: Fields) -> None:
        packing = fields.text("format", default=PACKED)
        if packing not in (PACKED, "mixed-precision"):
            raise _format(fields, packing)
        for key in ("transform_config", "sparsity_config"):
            extra = fields.values.get(key)
            if extra and not (isinstance(extra, dict) and extra.get("format") == "dense"):
                raise fields.unsupported(
                    key, got="a value", wanted="nothing", then="Ignoring it would change what the model computes."
                )
        groups = fields.child("config_groups", fields.values.get("config_groups"))
        self.groups = [_group(groups.child(name, values)) for name, values in groups.values.items()]
        self.cache = fields.values.get("kv_cache_scheme") is not None
        self.where = fields.where

    def scheme(self, module: str) -> Scheme:
        """The group that names the module, else one whose pattern matches it, else the one for its class."""
        for group in self.groups:
            if module in group.names:
                return group.scheme
        for group in self.groups:
            if any(pattern.match(module) for pattern in group.patterns):
                return group.scheme
        # classes are not in the files: "Linear" is what holds packed weights
        for group in self.groups:
            if "Linear" in group.names:
                return group.scheme
        classes = [group for group in self.groups if any("." not in name for name in group.names)]
        if len(classes) != 1:
            then = "Add it to the targets of its group."
            raise bad(f"{self.where}.config_groups", got=f"no group for {module}", wanted="one", then=then)
        return classes[0].scheme

    def required(self, module: str) -> tuple[str, ...]:
        scheme = self.scheme(module)
        names = ["weight_packed", "weight_scale", "weight_shape"]
        names += [] if scheme.symmetric else ["weight_zero_point"]
        return (*names, *(["weight_g_idx"] if scheme.act_order else []))

    def ignores(self, tensor: str) -> bool:
        return self.cache and CACHE.match(tensor) is not None

    def plan(self, module: str, parts: Parts) -> Plan:
        codes, shape = parts["weight_packed"], parts["weight_shape"]
        codes.want("I32", (None, None))
        shape.want(("I64", "I32"), (2,))
        n, k = (int(length) for length in shape.read())
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
        groups = {}
        # the most common scheme takes the class, the others name their modules, which the library matches first
        for index, each in enumerate(sorted(found or {scheme: ()}, key=lambda each: -len(found.get(each, ())))):
            strategy = {"strategy": "channel"} if each.group == CHANNEL else {"strategy": "group"}
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if index == 0 else list(found[each]),
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": each.symmetric,
                    **strategy,
                    "group_size": None if each.group == CHANNEL else each.group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }


def _group(fields: Fields) -> _Group:
    for key in ("input_activations", "output_activations"):
        if fields.values.get(key) is not None:
            raise fields.unsupported(
                key, got="a value", wanted="null", then="w4a16 computes with 16-bit activations only."
            )
    packing = fields.text("format", default=PACKED)
    if packing != PACKED:
        raise _format(fields, packing)
    targets = fields.get("targets", kind=list, wanted="a list of names")
    if not all(isinstance(target, str) for target in targets):
        raise bad(f"{fields.where}.targets", got=targets, wanted="a list of names", then=SEE_CONFIG)
    weights = fields.child("weights", fields.values.get("weights"))
    number = weights.text("type", default="int")
    if number != "int":
        raise weights.unsupported("type", got=repr(number), wanted="'int'", then="w4a16 holds integers only.")
    weights.four_bits("num_bits")
    return _Group(
        names=tuple(target for target in targets if not target.startswith("re:")),
        patterns=tuple(fields.pattern(target[3:]) for target in targets if target.startswith("re:")),
        scheme=Scheme(_columns(weights), weights.flag("symmetric", True), weights.values.get("actorder") in ORDERED),
    )


def _columns(weights: Fields) -> int:
    size = CHANNEL if weights.values.get("group_size") is None else weights.group("group_size")
    strategy = weights.text("strategy", default="channel" if size == CHANNEL else "group")
    if strategy not in ("group", "channel"):
        raise weights.unsupported("strategy", got=repr(strategy), wanted="'group' or 'channel'", then="Requantise it.")
    if (strategy == "channel") != (size == CHANNEL):
        raise bad(f"{weights.where}.group_size", got=size, wanted=f"what strategy {strategy} says", then=SEE_CONFIG)
    return size


def _format(fields: Fields, packing: str) -> Unsupported:
    return fields.unsupported(
        "format", got=repr(packing), wanted=f"'{PACKED}'", then="w4a16 reads integer weights of 4 bits only."
    )


def _read_zeros(entry: Entry, plan: Plan) -> Tensor:
    stored = entry.read()
    if stored.dtype == torch.int32:
        return unpack_nibbles(stored.t().contiguous()).t()[: plan.n].contiguous()
    if (stored < -8).any() or (stored > 7).any():
        raise entry.bad("values", got=f"{int(stored.min())} to {int(stored.max())}", wanted="-8 to 7")
    return (stored + 8).to(torch.uint8)
