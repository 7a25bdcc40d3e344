"""The attention behind an operator, from the sizes of its inputs (recorded with record_shapes=True)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .model import ACT_BYTES, Cost

# Operators whose first three inputs are q, k, v as [batch, heads, tokens, head], and where they say is_causal.
_CAUSAL_AT = {
    "aten::scaled_dot_product_attention": 5,
    "aten::_scaled_dot_product_flash_attention": 4,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 4,
    "aten::_scaled_dot_product_efficient_attention": 6,
    "aten::_scaled_dot_product_cudnn_attention": 6,
}
_ACTS = {"float": "fp32", "Half": "fp16", "BFloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """softmax(q k^T) v of q [batch, heads, m, head], k and v [batch, kv_heads, keys, head]."""

    batch: int
    heads: int
    kv_heads: int
    m: int
    keys: int
    head: int
    causal: bool
    act: str

    @property
    def shape(self) -> str:
        words = f"{self.batch}x{self.heads}x{self.m}x{self.head} over {self.kv_heads}x{self.keys}"
        return words + (" causal" if self.causal else "")

    def cost(self) -> Cost:
        """Both products, without the scores above the diagonal; q, k, v read once and the output written once."""
        pairs = self.m * self.keys
        if self.causal:  # row i sees the keys up to i
            seen = min(self.m, self.keys)
            pairs = seen * (seen + 1) // 2 + (self.m - seen) * self.keys
        rows = self.batch * self.head * (2 * self.heads * self.m + 2 * self.kv_heads * self.keys)
        return Cost(flops=4 * self.batch * self.heads * self.head * pairs, bytes=ACT_BYTES[self.act] * rows)


def attention_of(name: str, arguments: dict[str, Any]) -> Attention | None:
    """The attention of one operator event's `args`; None when they do not tell."""
    dims, types = arguments.get("Input Dims"), arguments.get("Input type")
    if name not in _CAUSAL_AT or not isinstance(dims, list) or not isinstance(types, list) or len(dims) < 3:
        return None
    q, k, v = (tuple(d) for d in dims[:3])
    act = _ACTS.get(str(types[0]).removeprefix("c10::")) if types else None
    if act is None or not len(q) == len(k) == 4 or k != v or not all(isinstance(s, int) for s in (*q, *k)):
        return None
    said = arguments.get("Concrete Inputs", [])
    at = _CAUSAL_AT[name]
    causal = len(said) > at and str(said[at]) == "True"
    return Attention(batch=q[0], heads=q[1], kv_heads=k[1], m=q[2], keys=k[2], head=q[3], causal=causal, act=act)
