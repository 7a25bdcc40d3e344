"""W4A16_VLLM=0 is vLLM itself: the same text from what it can serve, its own errors for the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DENSE, MOE, Oracle
from compare import check
from conftest import EAGER

BF16 = {"dtype": "bfloat16", "enforce_eager": True}
BOTH = ("ct-sym-g128", "ct-asym-g32", "awq-asym-g32", "gptq-sym-g128")
# vLLM 0.32 on a CPU without AMX; the first two everywhere
ONLY_W4A16 = {
    (DENSE, "gptq-asym-g32"): "sym=False",
    (DENSE, "gptq-sym-desc-act"): "desc_act",
    (MOE, "ct-asym-g32"): "backend",
}
IN_VLLM = "ct-asym-g32"
NOISE = 0.15  # nats: bf16 activations through four layers, against fp32


@pytest.fixture(scope="module")
def off(engines: Callable[..., Any], checkpoint: Callable[[str, str], Path]) -> dict[str, Any]:
    jobs = {recipe: (checkpoint(DENSE, recipe), BF16) for recipe in BOTH}
    jobs |= {f"{model} {recipe}": (checkpoint(model, recipe), BF16) for model, recipe in ONLY_W4A16}
    found: dict[str, Any] = engines(jobs, W4A16_VLLM="0")
    return found


@pytest.fixture(scope="module")
def on(engines: Callable[..., Any], checkpoint: Callable[[str, str], Path]) -> dict[str, Any]:
    found: dict[str, Any] = engines({recipe: (checkpoint(DENSE, recipe), BF16) for recipe in BOTH})
    return found


@pytest.fixture(scope="module")
def dequantised(engines: Callable[..., Any], dense: Callable[[str, str], Path]) -> dict[str, Any]:
    jobs = {model: (dense(model, IN_VLLM), EAGER) for model in (DENSE, MOE)}
    found: dict[str, Any] = engines(jobs, W4A16_VLLM="0")
    return found


@pytest.mark.parametrize("recipe", BOTH)
def test_on_off_and_dequantised_say_the_same(
    recipe: str, on: dict[str, Any], off: dict[str, Any], prompts: list[list[int]], oracle: Callable[..., Oracle]
) -> None:
    """bf16 rounds everything, so logprobs agree to NOISE, and tokens up to the first tie within twice that."""
    dense = oracle(DENSE, recipe)
    assert check(on[recipe], prompts, dense, noise=NOISE) > 0
    assert any("w4a16 serves" in line for line in on[recipe]["log"])
    assert off[recipe]["log"] == []
    if "cpu_gemm_wna16" in off[recipe].get("error", ""):
        pytest.skip("vLLM's build for this CPU has no int4 kernel (it needs AVX-512): w4a16 alone serves it here")
    assert check(off[recipe], prompts, dense, noise=NOISE) > 0


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_the_dequantised_model_in_vllm_says_the_same(
    model: str, served: dict[str, Any], dequantised: dict[str, Any]
) -> None:
    """One engine, fp32: 4-bit weights on w4a16 against the dense weights they stand for on vLLM's own kernels."""
    ours, dense = served[f"{model} {IN_VLLM}"], dequantised[model]
    assert "error" not in dense, dense["error"]
    for got, wanted in zip(ours["outputs"], dense["outputs"], strict=True):
        assert got["tokens"] == wanted["tokens"]
        for step, other in zip(got["logprobs"], wanted["logprobs"], strict=True):
            assert all(abs(step[token] - other[token]) < 2e-3 for token in step.keys() & other.keys())


@pytest.mark.parametrize(("model", "recipe"), ONLY_W4A16)
def test_vllm_alone_refuses(model: str, recipe: str, off: dict[str, Any]) -> None:
    assert ONLY_W4A16[model, recipe] in off[f"{model} {recipe}"]["error"]
