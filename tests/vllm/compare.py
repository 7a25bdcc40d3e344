"""What it means that two engines say the same: equal tokens, but for ties, and equal logprobs up to rounding."""

from __future__ import annotations

from typing import Any

from checkpoints import Oracle


def check(answer: dict[str, Any], prompts: list[list[int]], oracle: Oracle, *, noise: float) -> int:
    """Compares greedy tokens and logprobs with the dense model's; returns how many tokens were compared.

    `noise` is the largest error of a logprob in nats. Where the tokens part, the dense model must hold the two within
    twice that of each other, a tie; what comes after one is another text, and is not compared.
    """
    assert "error" not in answer, answer["error"]
    compared = 0
    for prompt, output in zip(prompts, answer["outputs"], strict=True):
        tokens, steps = output["tokens"], output["logprobs"]
        wanted = oracle.logprobs([*prompt, *tokens])
        for index, (token, step) in enumerate(zip(tokens, steps, strict=True)):
            row = wanted[len(prompt) + index - 1]
            for other, logprob in step.items():
                assert abs(logprob - float(row[int(other)])) <= noise, (index, other, logprob, float(row[int(other)]))
            best = int(row.argmax())
            compared += 1
            if token != best:
                assert float(row[best] - row[token]) <= 2 * noise, (index, token, best)
                break
    return compared
