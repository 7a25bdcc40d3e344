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
# bf16's own rounding, up to 0.2 nats here, would hide a fault
ENGINE = {
    "dtype": "float16",
    "max_num_seqs": 2,
    "enable_prefix_caching": False,  # the third prompt is the first again
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 28,  # or vLLM measures what is free, and fails where others use the GPU meanwhile
    "max_num_batched_tokens": 256,
    "compilation_config": {"cudagraph_capture_sizes": SIZES},
}
FP16 = 0.0125  # nats: the dequantised model in fp16 errs by up to 0.0098, dense, and 0.0116, MoE, after 76 tokens
COMPILED = re.compile(r"JIT compilation during inference: (\w+)")
KERNELS = Path(__file__).parents[2] / "src" / "w4a16"


@pytest.fixture(scope="module")
def asks(prompts: list[list[int]]) -> list[list[int]]:
    """Three for an engine of two sequences: two are decoded by the graph of 2 tokens, the third by that of 1."""
    text = [token for prompt in prompts for token in prompt]
    long = (text * LONG)[:LONG]
    return [long, prompts[1], long]


@pytest.fixture(scope="module")
def answers(engines: Callable[..., Any], checkpoint: Callable[[str, str], Path], asks: list[list[int]]) -> Any:
    jobs = {model: (checkpoint(model, RECIPE), ENGINE) for model in (DENSE, MOE)}
    return engines(jobs, tokens=NEW, asks=asks, W4A16_PROFILE="1")


def chosen(scopes: list[Scope]) -> bool:
    device = this_machine()
    return all(choose(replace(scope.problem, resident=False), device).row.stem == scope.stem for scope in scopes)


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_the_answers_are_the_dense_models(
    model: str, answers: Any, asks: list[list[int]], oracle: Callable[..., Any]
) -> None:
    """Token for token: no two of the likeliest are within twice the bound of each other."""
    assert check(answers[model], asks, oracle(model, RECIPE), noise=FP16) == NEW * len(asks)


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_graphs_hold_the_kernels_of_their_row_count(model: str, answers: Any, asks: list[list[int]]) -> None:
    answer = answers[model]
    assert "error" not in answer, answer["error"]
    captured, answering = ([parse(name) for name in answer[when]] for when in ("captured", "scopes"))
    for scopes in (captured, answering):
        assert None not in scopes
        assert chosen(scopes)
    assert {scope.problem.m for scope in captured if not scope.problem.experts} >= set(SIZES)
    # prompts run kernel by kernel, the first two as one; what follows is graphs, and shows none
    assert {scope.problem.m for scope in answering} == {len(asks[0]) + len(asks[1]), len(asks[2])}


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_nothing_is_compiled_for_a_request(model: str, answers: Any) -> None:
    assert "error" not in answers[model]
    ours = "\n".join(file.read_text() for folder in ("kernels", "moe") for file in (KERNELS / folder).glob("*.py"))
    late = {name for name in COMPILED.findall(answers[model]["said"]) if f"def {name}(" in ours}
    assert not late, f"compiled while a request waited: {late}"
