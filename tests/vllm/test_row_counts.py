"""The kernel follows the row count of each call: chunked prefill and decode of one engine, eager and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DENSE, MOE, Oracle
from compare import check

from w4a16.roofline.labels import parse

CHUNK, LONG, NEW = 32, 70, 6  # 70 tokens are prefilled as 32, 32 and 6
BASE = {"dtype": "float32", "max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True}
COMPILED = {**BASE, "enforce_eager": False}
# the second compiled engine takes the graph of the first from disk
MODES = {"eager": {**BASE, "enforce_eager": True}, "compiled": COMPILED, "from-disk": COMPILED}
RUNS = [(DENSE, "eager"), (DENSE, "compiled"), (DENSE, "from-disk"), (MOE, "eager"), (MOE, "compiled")]


@pytest.fixture(scope="module")
def long_prompt(prompts: list[list[int]]) -> list[int]:
    text = [token for prompt in prompts for token in prompt]
    return (text * LONG)[:LONG]


@pytest.fixture(scope="module")
def answers(
    engines: Callable[..., Any], checkpoint: Callable[[str, str], Path], long_prompt: list[int]
) -> dict[str, Any]:
    jobs = {f"{model} {mode}": (checkpoint(model, "ct-asym-g32"), MODES[mode]) for model, mode in RUNS}
    found: dict[str, Any] = engines(jobs, tokens=NEW, asks=[long_prompt], W4A16_PROFILE="1")
    return found


@pytest.mark.parametrize(("model", "mode"), RUNS)
def test_kernel_by_row_count(
    model: str, mode: str, answers: dict[str, Any], long_prompt: list[int], oracle: Callable[..., Oracle]
) -> None:
    answer = answers[f"{model} {mode}"]
    assert check(answer, [long_prompt], oracle(model, "ct-asym-g32"), noise=2e-3) == NEW
    scopes = [parse(name) for name in answer["scopes"]]
    linear = [scope for scope in scopes if scope is not None and not scope.problem.experts]
    assert {scope.problem.m for scope in linear} == {CHUNK, LONG - 2 * CHUNK, 1}
    assert {scope.stem for scope in linear if scope.problem.m == CHUNK} == {"cpu_prefill"}
    assert {scope.stem for scope in linear if scope.problem.m == 1} == {"cpu_decode"}
    if model == MOE:
        assert {s.problem.m for s in scopes if s is not None and s.stem == "cpu_moe"} == {CHUNK, LONG - 2 * CHUNK, 1}


KEY = """
from vllm.engine.arg_utils import EngineArgs
import sys
for folder in sys.argv[1:]:
    print("key", EngineArgs(model=folder).create_model_config().compute_hash())
"""


def test_graphs_on_disk_are_kept_apart(checkpoint: Callable[[str, str], Path]) -> None:
    """With the plugin off vLLM must not find the graphs that were compiled with it on."""
    folders = [str(checkpoint(DENSE, recipe)) for recipe in ("ct-asym-g32", "awq-asym-g32", "gptq-sym-g128")]
    keys = {}
    for run, value in (("on", "1"), ("again", "1"), ("off", "0")):
        env = {**os.environ, "W4A16_VLLM": value, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", KEY, *folders], env=env, capture_output=True, text=True, check=True
        )
        keys[run] = [line for line in done.stdout.splitlines() if line.startswith("key ")]
    assert len(keys["on"]) == len(folders)
    assert keys["on"] == keys["again"]
    assert not set(keys["on"]) & set(keys["off"])
