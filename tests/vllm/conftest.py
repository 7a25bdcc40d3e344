"""Starts engines, keeps what they answered for every test that asks, and makes the checkpoints they load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DENSE, MODELS, MOE, RECIPES, Oracle, dequantized, make
from transformers import AutoTokenizer

ENGINE = Path(__file__).with_name("engine.py")
TIMEOUT_S = 300  # for each engine
NEW_TOKENS = 16
TEXTS = ("import os\n\ndef ", "class Heap:\n    def push(self, item):\n        ", "for ")
EAGER = {"dtype": "float32", "enforce_eager": True}

Engines = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def checkpoint(work: Path) -> Callable[[str, str], Path]:
    return lambda model, recipe: make(model, RECIPES[recipe], work / f"{model}-{recipe}")


@pytest.fixture(scope="session")
def dense(work: Path, checkpoint: Callable[[str, str], Path]) -> Callable[[str, str], Path]:
    """The dequantised model as a checkpoint, fp32."""
    return lambda model, recipe: dequantized(model, checkpoint(model, recipe), work / f"{model}-{recipe}-dense")


@pytest.fixture(scope="session")
def oracle(dense: Callable[[str, str], Path]) -> Callable[[str, str], Oracle]:
    """The dequantised model in transformers, fp32."""
    return lambda model, recipe: Oracle.of(dense(model, recipe))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / DENSE)
    return [tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="session")
def engines(work: Path, prompts: list[list[int]]) -> Engines:
    """Runs jobs, name to (folder, engine settings), in one process under `env`; returns each job's answer by name.

    `asks` replaces the prompts. With W4A16_PROFILE in `env` an answer holds the names of w4a16's profiler ranges.
    `said` in each is all that the process wrote.
    """

    def run(
        jobs: dict[str, tuple[Path, dict[str, Any]]],
        tokens: int = NEW_TOKENS,
        asks: list[list[int]] | None = None,
        **env: str,
    ) -> dict[str, Any]:
        stem = f"jobs-{len(list(work.glob('jobs-*.json')))}"
        asked = {
            name: {
                "model": str(folder),
                "engine": settings,
                "prompts": asks or prompts,
                "tokens": tokens,
                "profile": "W4A16_PROFILE" in env,
            }
            for name, (folder, settings) in jobs.items()
        }
        (work / f"{stem}.json").write_text(json.dumps(asked))
        results, log = work / f"results-{stem}.json", work / f"{stem}.log"
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(work / "cache"),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two ranks want two NUMA nodes
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("w") as out:
            subprocess.run(
                [sys.executable, ENGINE, work / f"{stem}.json", results],
                env={**os.environ, **settings, **env}, stdout=out, stderr=out, check=False,
                timeout=TIMEOUT_S * len(jobs),
            )  # fmt: skip
        done: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
        said = log.read_text(errors="replace")
        assert done.keys() == asked.keys(), f"the engine died: {said[-3000:]}"
        return {name: {**answer, "said": said} for name, answer in done.items()}

    return run


# not for experts: gate and up of one in different orders (w4a16 reads their input once, and says so); one head will do
DENSE_ONLY = ("gptq-sym-desc-act-own", "gptq-asym-head")
ALL = [(model, recipe) for model in (DENSE, MOE) for recipe in RECIPES if model == DENSE or recipe not in DENSE_ONLY]


@pytest.fixture(scope="session")
def served(engines: Engines, checkpoint: Callable[[str, str], Path]) -> dict[str, Any]:
    """Every model in every format with the plugin on, fp32, eager."""
    return engines({f"{model} {recipe}": (checkpoint(model, recipe), EAGER) for model, recipe in ALL})
