"""GPTQ: `qweight` [K//8, N] packed along K, `qzeros` [G, N//8] along N, `scales` [G, N], `g_idx` [K]."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..weight import QuantizedWeight, pack_nibbles, unpack_nibbles
from .base import (
    Fields,
    Parts,
    Plan,
    Scheme,
    drop_trivial,
    even_rows,
    one_group,
    order_of,
    plan_module,
    read_order,
    read_scales,
    zeros_of,
)
from .bits import invert, take_columns, transpose
from .shards import FLOATS, Files

# Version 1 stores every zero point less one. GPTQModel, which defines it, subtracts from the whole word, so a zero
# point of 0 borrows from its neighbour: only adding to the whole word gives it back.
ONES = 0x11111111


class Gptq:
    name: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros", "g_idx")
    planned: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields) -> None:
        packing = fields.text("checkpoint_format", "format", default="gptq")
        if packing not in ("gptq", "gptq_v2") or fields.flag("is_marlin_format", False):
            raise fields.unsupported(
                "checkpoint_format", got=repr(packing), wanted="'gptq' or 'gptq_v2'", then="Save it in one of these."
            )
        word = fields.text("pack_dtype", default="int32")
        if word != "int32":
            raise fields.unsupported("pack_dtype", got=repr(word), wanted="'int32'", then="Save it with int32 words.")
        self.offset = ONES if packing == "gptq" else 0
        rules = fields.get("dynamic", kind=dict, wanted="a JSON object", default={})
        self.rules = [
            (rule.startswith("-:"), fields.pattern(re.sub(r"^[-+]:", "", rule)), fields.child(rule, values or {}))
            for rule, values in rules.items()
        ]
        self.fields = fields
        if not self.rules:
            self.scheme("")  # a wrong value is an error even when no module uses it

    def scheme(self, module: str) -> Scheme:
        """The scheme of one module: the first rule of `dynamic` that matches it overrides the model's values."""
        fields = self.fields
        for skip, pattern, override in self.rules:
            if pattern.match(module):
                if not skip:  # a module that the rules skip and the files still hold quantised is read as it is there
                    fields = Fields({**fields.values, **override.values}, override.where)
                break
        fields.four_bits("bits")
        return Scheme(fields.group("group_size"), fields.flag("sym", True), fields.flag("desc_act", False))

    def required(self, module: str) -> tuple[str, ...]:
        needs_order = self.scheme(module).act_order
        return self.suffixes if needs_order else ("qweight", "scales", "qzeros")

    def ignores(self, tensor: str) -> bool:
        return False

    def plan(self, module: str, parts: Parts, files: Files) -> Plan:
        codes = parts["qweight"]
        codes.want("I32", (None, None))
        words, n = codes.shape
        plan = plan_module(codes, n, 8 * words, self.scheme(module))
        if n % 8:
            raise codes.bad("shape", got=list(codes.shape), wanted="a multiple of 8 columns")
        parts["scales"].want(FLOATS, (plan.groups, n))
        parts["qzeros"].want("I32", (plan.groups, n // 8))
        if "g_idx" in parts:
            parts["g_idx"].want("I32", (plan.k,))
        return plan

    def read(self, parts: Parts, plan: Plan) -> QuantizedWeight:
        codes = transpose(parts["qweight"].read())
        perm = read_order(parts["g_idx"], plan) if "g_idx" in parts else None
        zeros = unpack_nibbles(parts["qzeros"].read() + self.offset).t().contiguous()
        return QuantizedWeight(
            codes=codes if perm is None else take_columns(codes, perm),
            scales=read_scales(parts["scales"]).t().contiguous(),
            zeros=drop_trivial(zeros, plan.scheme),
            group=plan.group,
            perm=perm,
        )

    @staticmethod
    def write(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
        even_rows(weight, "GPTQ")
        codes = weight.codes if weight.perm is None else take_columns(weight.codes, invert(weight.perm))
        zeros = pack_nibbles(zeros_of(weight).t())
        return {
            "qweight": transpose(codes.cpu()),
            "qzeros": zeros - ONES if _version(scheme) == "gptq" else zeros,
            "scales": weight.scales.t().contiguous(),
            "g_idx": order_of(weight),
        }

    @staticmethod
    def describe(scheme: Scheme, found: Mapping[Scheme, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
        one_group("GPTQ", found)
        heads = {module.rpartition(".")[2] for modules in found.values() for module in modules}
        version = _version(scheme)
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": next(iter(found), scheme).group,
            "sym": all(each.symmetric for each in found),
            "desc_act": any(each.act_order for each in found),
            "lm_head": "lm_head" in heads,
            "checkpoint_format": version,
            "format": version,
            "pack_dtype": "int32",
            "dynamic": {f"-:^{re.escape(module)}$": {} for module in ignore} or None,
        }


def _version(scheme: Scheme) -> str:
    # several readers of version 1 add one nibble by nibble and lose a zero point of 0; version 2 is read alike by all
    return "gptq" if scheme.symmetric else "gptq_v2"
