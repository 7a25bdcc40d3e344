"""How far a quantised model is from its dense original on a text: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """perplexity is exp of a token's mean negative log-likelihood; kl_per_token is KL(dense || quantised) in nats."""

    tokens: int
    perplexity_dense: float
    perplexity_quantized: float
    kl_per_token: float
    top1_agreement: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.inference_mode()
def compare(dense: Any, quantized: Any, ids: Tensor, *, window: int = 512) -> Comparison:
    """Runs both causal LMs over ids [L] in windows that do not overlap; the first token of a window is not predicted.

    Raises BadInput when the text is shorter than two tokens.
    """
    if ids.ndim != 1 or ids.numel() < 2:
        raise BadInput(f"text: got {ids.numel()} tokens, wanted at least 2. Pass a longer --text.")
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for chunk in ids.split(window):
        if chunk.numel() < 2:
            continue
        targets = chunk[1:]
        p = F.log_softmax(dense(chunk[None].to(dense.device)).logits[0, :-1].float().cpu(), dim=-1)
        q = F.log_softmax(quantized(chunk[None].to(quantized.device)).logits[0, :-1].float().cpu(), dim=-1)
        sums += torch.stack(
            [
                F.nll_loss(p, targets, reduction="sum"),
                F.nll_loss(q, targets, reduction="sum"),
                F.kl_div(q, p, reduction="sum", log_target=True),
                (p.argmax(-1) == q.argmax(-1)).sum().float(),
            ]
        ).double()
        count += targets.numel()
    nll_dense, nll_quantized, kl, agree = (float(total) / count for total in sums)
    return Comparison(
        tokens=count,
        perplexity_dense=math.exp(nll_dense),
        perplexity_quantized=math.exp(nll_quantized),
        kl_per_token=kl,
        top1_agreement=agree,
    )
