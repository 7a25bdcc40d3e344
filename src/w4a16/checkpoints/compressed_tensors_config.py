"""The configuration of compressed-tensors: which group of settings a module belongs to, and what they say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Unsupported
from .base import CHANNEL, SEE_CONFIG, Fields, Scheme
from .shards import bad

PACKED = "pack-quantized"
ORDERED = ("group", "dynamic", "true")  # spellings of "columns of a group are not neighbours"


@dataclass(frozen=True)
class Group:
    names: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    scheme: Scheme


def parse_groups(fields: Fields) -> list[Group]:
    """The groups of a `quantization_config`; raises at any setting that is not 4-bit integers under 16-bit inputs."""
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
    return [_group(groups.child(name, values)) for name, values in groups.values.items()]


def scheme_of(module: str, groups: Sequence[Group], where: str) -> Scheme:
    """The group that names the module, else one whose pattern matches it, else the one for its class."""
    for group in groups:
        if module in group.names:
            return group.scheme
    for group in groups:
        if any(pattern.match(module) for pattern in group.patterns):
            return group.scheme
    # classes are not in the files: "Linear" is what holds packed weights
    for group in groups:
        if "Linear" in group.names:
            return group.scheme
    classes = [group for group in groups if any("." not in name for name in group.names)]
    if len(classes) != 1:
        then = "Add it to the targets of its group."
        raise bad(f"{where}.config_groups", got=f"no group for {module}", wanted="one", then=then)
    return classes[0].scheme


def describe(scheme: Scheme, found: Mapping[Scheme, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose modules have the schemes `found`."""
    groups = {}
    # the most common scheme takes the class, the others name their modules, which the library matches first
    for index, each in enumerate(sorted(found or {scheme: ()}, key=lambda each: -len(found.get(each, ())))):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if index == 0 else list(found[each]),
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": each.symmetric,
                "strategy": "channel" if each.group == CHANNEL else "group",
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


def _group(fields: Fields) -> Group:
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
    return Group(
        names=tuple(target for target in targets if not target.startswith("re:")),
        patterns=tuple(fields.pattern(target[3:]) for target in targets if target.startswith("re:")),
        scheme=Scheme(
            _columns(weights), weights.flag("symmetric", True), str(weights.values.get("actorder")).lower() in ORDERED
        ),
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
