"""The shipped models, dense and MoE, in every format: the plugin's tokens and logprobs are the dequantised model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checkpoints import Oracle
from compare import check
from conftest import ALL, NEW_TOKENS, TEXTS

FP32 = 2e-3  # nats


@pytest.mark.parametrize(("model", "recipe"), ALL)
def test_equals_the_dequantised_model(
    model: str, recipe: str, served: dict[str, Any], prompts: list[list[int]], oracle: Callable[..., Oracle]
) -> None:
    answer = served[f"{model} {recipe}"]
    compared = check(answer, prompts, oracle(model, recipe), noise=FP32)
    assert compared == NEW_TOKENS * len(TEXTS)  # no ties among these


@pytest.mark.parametrize(("model", "recipe"), ALL)
def test_landed_on_w4a16(model: str, recipe: str, served: dict[str, Any]) -> None:
    log = " ".join(served[f"{model} {recipe}"]["log"])
    assert "stays on vLLM" not in log
