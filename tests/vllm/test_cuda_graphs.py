"""On a GPU: every CUDA graph holds the kernels of its own row count, and no request waits for a compiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DENSE, MOE
from compare import check

from w4a16.device import this_machine
from w4a16.dispatch import choose
from w4a16.roofline.labels import Scope, parse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and vLLM built for it")

SIZES, LONG, NEW, RECIPE = (1, 2, 4, 8), 70, 6, "ct-asym-g32"
ENGINE = {
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 28,  # or vLLM measures what is free, and fails where others use the GPU meanwhile
    "max_num_batched_tokens": 256,
    "compilation_config": {"cudagraph_capture_sizes": SIZES},
}
BF16 = 0.05  # nats
COMPILED = re.compile(r"JIT compilation during inference: (\w+)")
KERNELS = Path(__file__).parents[2] / "src" / "w4a16"


@pytest.fixture(scope="module")
def long_prompt(prompts: list[list[int]]) -> list[int]:
    text = [token for prompt in prompts for token in prompt]
    return (text * LONG)[:LONG]


@pytest.fixture(scope="module")
def answers(engines: Callable[..., Any], checkpoint: Callable[[str, str], Path], long_prompt: list[int]) -> Any:
    jobs = {model: (checkpoint(model, RECIPE), ENGINE) for model in (DENSE, MOE)}
    return engines(jobs, tokens=NEW, asks=[long_prompt], W4A16_PROFILE="1")


def chosen(scopes: list[Scope]) -> bool:
    device = this_machine()
    return all(choose(replace(scope.problem, resident=False), device).row.stem == scope.stem for scope in scopes)


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_the_answers_are_the_dense_models(
    model: str, answers: Any, long_prompt: list[int], oracle: Callable[..., Any]
) -> None:
    assert check(answers[model], [long_prompt], oracle(model, RECIPE), noise=BF16) > 0


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_graphs_hold_the_kernels_of_their_row_count(model: str, answers: Any) -> None:
    answer = answers[model]
    assert "error" not in answer, answer["error"]
    captured, answering = ([parse(name) for name in answer[when]] for when in ("captured", "scopes"))
    for scopes in (captured, answering):
        assert None not in scopes
        assert chosen(scopes)
    assert {scope.problem.m for scope in captured if not scope.problem.experts} >= set(SIZES)
    # the prompt runs kernel by kernel; one token at a time is a graph, and shows none
    assert {scope.problem.m for scope in answering} == {LONG}


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_nothing_is_compiled_for_a_request(model: str, answers: Any) -> None:
    assert "error" not in answers[model]
    ours = "\n".join(file.read_text() for folder in ("kernels", "moe") for file in (KERNELS / folder).glob("*.py"))
    late = {name for name in COMPILED.findall(answers[model]["said"]) if f"def {name}(" in ours}
    assert not late, f"compiled while a request waited: {late}"
