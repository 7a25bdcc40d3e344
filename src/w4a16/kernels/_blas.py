"""One product by the vendor BLAS, its bias added before the output is rounded."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """out [M, N] = x [M, K] @ w [N, K]^T + bias; x is cast to w's dtype, fp32 sums are rounded once to out's."""
    x = x.to(w.dtype)
    if out.dtype != w.dtype:
        y = torch.mm(x, w.t())
        if bias is None:
            out.copy_(y)
        else:
            torch.add(y, bias, out=out)
    elif bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias, x, w.t(), out=out)
