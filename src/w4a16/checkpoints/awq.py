"""AWQ, GEMM packing: `qweight` [K, N//8] and `qzeros` [G, N//8] interleaved along N, `scales` [G, N]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..errors import Unsupported
from ..weight import QuantizedWeight, pack_nibbles, unpack_nibbles
from .base import Fields, Parts, Plan, Scheme, drop_trivial, even_rows, one_group, plan_module, read_scales, zeros_of
from .bits import transpose_nibbles
from .shards import FLOATS, Files

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds output column ORDER[i]
INVERSE = tuple(ORDER.index(column) for column in range(8))


class Awq:
    name: ClassVar[str] = "awq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros")
    planned: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields) -> None:
        fields.four_bits("bits", "w_bit")
        packing = fields.text("version", "format", default="gemm")
        if packing.lower() != "gemm":
            raise fields.unsupported(
                "version", got=repr(packing), wanted="'gemm'", then="Its bits lie in another order; save it as GEMM."
            )
        self.stores_zeros = fields.flag("zero_point", True)
        # `sym` is what GPTQModel and w4a16 write; AutoAWQ has no such key
        symmetric = fields.flag("sym", False) or not self.stores_zeros
        self.scheme = Scheme(fields.group("group_size", "q_group_size"), symmetric)

    def required(self, module: str) -> tuple[str, ...]:
        return self.suffixes if self.stores_zeros else ("qweight", "scales")

    def ignores(self, tensor: str) -> bool:
        return False

    def plan(self, module: str, parts: Parts, files: Files) -> Plan:
        codes = parts["qweight"]
        codes.want("I32", (None, None))
        k, words = codes.shape
        plan = plan_module(codes, 8 * words, k, self.scheme)
        parts["scales"].want(FLOATS, (plan.groups, plan.n))
        if "qzeros" in parts:
            parts["qzeros"].want("I32", (plan.groups, words))
        return plan

    def read(self, parts: Parts, plan: Plan) -> QuantizedWeight:
        zeros = None
        if "qzeros" in parts:
            zeros = drop_trivial(unpack_nibbles(parts["qzeros"].read(), ORDER).t().contiguous(), self.scheme)
        return QuantizedWeight(
            codes=transpose_nibbles(parts["qweight"].read(), INVERSE),
            scales=read_scales(parts["scales"]).t().contiguous(),
            zeros=zeros,
            group=plan.group,
        )

    @staticmethod
    def write(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
        if weight.perm is not None:
            raise Unsupported("AWQ: got an act-order weight, wanted its columns in order. Write GPTQ instead.")
        even_rows(weight, "AWQ")
        rows = weight.codes.view(-1, 8, weight.k // 8)[:, ORDER].flatten(0, 1)
        return {
            "qweight": transpose_nibbles(rows),
            "qzeros": pack_nibbles(zeros_of(weight).t(), ORDER),
            "scales": weight.scales.t().contiguous(),
        }

    @staticmethod
    def describe(scheme: Scheme, found: Mapping[Scheme, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
        one_group("AWQ", found)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(found), scheme).group,
            "zero_point": True,  # stored also when all are 8: other loaders know no AWQ without zero points
            "sym": all(each.symmetric for each in found),
            "modules_to_not_convert": list(ignore) or None,
        }
