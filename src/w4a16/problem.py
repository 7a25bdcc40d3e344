"""Problem: what one call asks for, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import BadInput, explain_mismatch

ACT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ACT_DTYPES = {name: dtype for dtype, name in ACT_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """y[M, N] = x[M, K] @ W[N, K]^T, or for experts > 0 an expert layer of `experts` such weights, `top_k` a token.

    For an expert layer N and K are those of its first GEMM: N = 2 x intermediate when gated, K = hidden.
    `group` is the number of columns of W that share a scale; K for channel-wise. `resident`: W has a dequantised copy.
    """

    m: int
    n: int
    k: int
    group: int
    act: str = "bf16"
    has_zeros: bool = False
    experts: int = 0
    top_k: int = 0
    resident: bool = False

    def __post_init__(self) -> None:
        if self.act not in ACT_DTYPES:
            raise BadInput(_message("act", self.act, " or ".join(ACT_DTYPES)))
        if self.m < 0 or self.n < 1 or self.k < 1:
            raise BadInput(_message("m, n, k", (self.m, self.n, self.k), "m >= 0, n >= 1, k >= 1"))
        if self.group < 1 or self.k % self.group:
            raise BadInput(_message("group", self.group, f"a divisor of K={self.k}"))
        if self.experts < 0 or (self.experts and not 1 <= self.top_k <= self.experts):
            raise BadInput(_message("top_k", self.top_k, f"1 to experts={self.experts}"))

    @property
    def op(self) -> str:
        return "moe" if self.experts else "linear"


def _message(what: str, got: object, wanted: str) -> str:
    return explain_mismatch(f"Problem {what}", got=got, wanted=wanted, then="Correct the call.")
