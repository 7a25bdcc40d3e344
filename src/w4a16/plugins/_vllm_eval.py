"""A quantised model as vLLM serves it against its dense original: perplexity and top-1 agreement on a text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of each token of a text, the first of every window apart: its logprob, and which one the model held likeliest."""

    logprobs: Tensor  # [tokens], fp64
    best: Tensor  # [tokens], token ids


@dataclass(frozen=True, kw_only=True)
class EngineComparison:
    """As evaluate.Comparison, without the KL divergence: an engine hands out no whole distributions."""

    tokens: int
    perplexity_dense: float
    perplexity_quantized: float
    top1_agreement: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def compare(dense: Scores, quantized: Scores) -> EngineComparison:
    return EngineComparison(
        tokens=len(dense.logprobs),
        perplexity_dense=math.exp(-float(dense.logprobs.mean())),
        perplexity_quantized=math.exp(-float(quantized.logprobs.mean())),
        top1_agreement=float((dense.best == quantized.best).double().mean()),
    )


def windows(ids: Tensor, window: int) -> list[list[int]]:
    """The text in windows that do not overlap. Raises BadInput when it is shorter than two tokens."""
    if ids.ndim != 1 or ids.numel() < 2:
        raise BadInput(f"text: got {ids.numel()} tokens, wanted at least 2. Pass a longer --text.")
    return [chunk.tolist() for chunk in ids.split(window) if chunk.numel() > 1]


@torch.inference_mode()
def score_transformers(model: Any, chunks: list[list[int]]) -> Scores:
    logprobs, best = [], []
    for chunk in chunks:
        ids = torch.tensor(chunk)
        rows = torch.log_softmax(model(ids[None].to(model.device)).logits[0, :-1].float().cpu(), dim=-1)
        logprobs.append(rows.gather(1, ids[1:, None])[:, 0].double())
        best.append(rows.argmax(-1))
    return Scores(logprobs=torch.cat(logprobs), best=torch.cat(best))


def score_vllm(model: str, chunks: list[list[int]], **engine: Any) -> Scores:
    """The same from vLLM, which computes them while it prefills."""
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = max(len(chunk) for chunk in chunks)
    # one more for the token that is generated; prefixes shared in the cache would come without logprobs
    llm = LLM(model, **{"max_model_len": longest + 1, "enable_prefix_caching": False, **engine})
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=chunk) for chunk in chunks]
    logprobs, best = [], []
    for chunk, output in zip(chunks, llm.generate(prompts, sampling, use_tqdm=False), strict=True):
        for token, found in zip(chunk[1:], output.prompt_logprobs[1:], strict=True):
            logprobs.append(found[token].logprob)
            best.append(next(other for other, value in found.items() if value.rank == 1))
    return Scores(logprobs=torch.tensor(logprobs, dtype=torch.float64), best=torch.tensor(best))
