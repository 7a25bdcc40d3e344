"""The commands over vLLM, each run as a user would: serve, serve-bench, eval, and lm-evaluation-harness offline."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DENSE, MODELS, Oracle
from transformers import AutoTokenizer

RECIPE = "gptq-asym-g32"  # which vLLM alone refuses
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4")
START_S, STOP_S, TIMEOUT_S, NEW = 300, 60, 900, 8


def run(*command: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env={**os.environ, **ENV, **(env or {})}, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert not done.returncode, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str, str], Path]) -> Path:
    return checkpoint(DENSE, RECIPE)


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["w4a16", "serve", folder, "--engine", "vllm", "--host", "127.0.0.1", "--port", port, *ENGINE]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)], env={**os.environ, **ENV}, stdout=out, stderr=out
        )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def test_serve(server: str, folder: Path, oracle: Callable[..., Oracle]) -> None:
    body = {"model": str(folder), "prompt": "import os\n\ndef ", "max_tokens": NEW, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = json.loads(answer.read())["choices"][0]["text"]
    tokenizer = AutoTokenizer.from_pretrained(MODELS / DENSE)
    dense, ids = oracle(DENSE, RECIPE), tokenizer(body["prompt"]).input_ids
    for _ in range(NEW):
        ids.append(int(dense.logprobs(ids)[-1].argmax()))
    assert text == tokenizer.decode(ids[-NEW:])


@pytest.mark.parametrize("keep", [(), ("--keep",)])
def test_serve_bench(keep: tuple[str, ...], tmp_path: Path) -> None:
    """On the dense model, which both sides serve alike; one repetition, so no verdict."""
    out = tmp_path / "figures.json"
    sizes = ["--repeats", 1, "--input-len", 16, "--output-len", 4, "--prompts", 2]
    said = run("w4a16", "serve-bench", MODELS / DENSE, *keep, *sizes, "--json", out, *ENGINE)
    assert "TTFT ms" in said
    found = json.loads(out.read_text())
    assert {row["name"] for row in found["rows"]} == {"TTFT ms", "TPOT ms", "ITL ms", "tokens/s"}
    assert all(row["on"] > 0 and row["off"] > 0 for row in found["rows"])
    assert all(row["verdict"].startswith("none") for row in found["rows"])


def test_eval_is_what_transformers_says(folder: Path, tmp_path: Path) -> None:
    text = MODELS / "heldout.txt"
    common = [folder, "--dense", MODELS / DENSE, "--text", text, "--window", 128, "--max-tokens", 512]
    figures: dict[str, Any] = {}
    for engine in ("transformers", "vllm"):
        out = tmp_path / f"{engine}.json"
        run("w4a16", "eval", *common, "--engine", engine, "--dtype", "float32", "--json", out)
        figures[engine] = json.loads(out.read_text())
    ours, theirs = figures["vllm"], figures["transformers"]
    assert ours["tokens"] == theirs["tokens"] == 512 - 4
    assert ours["perplexity_dense"] == pytest.approx(theirs["perplexity_dense"], rel=1e-5)
    assert ours["perplexity_quantized"] == pytest.approx(theirs["perplexity_quantized"], rel=1e-4)
    assert ours["top1_agreement"] == pytest.approx(theirs["top1_agreement"], abs=2 / 508)


def test_lm_eval_offline(folder: Path, dense: Callable[[str, str], Path], tmp_path: Path) -> None:
    """The task on the shipped text: the 4-bit model in vLLM scores as its dequantised self in transformers."""
    task = ["--tasks", "w4a16_heldout", "--include_path", MODELS / "lm_eval", "--limit", 1]
    models = {
        "vllm": f"pretrained={folder},dtype=float32,enforce_eager=True,max_model_len=1024",
        "hf": f"pretrained={dense(DENSE, RECIPE)},dtype=float32,max_length=1024",
    }
    bits = {}
    for name, arguments in models.items():
        out = tmp_path / name
        run("lm_eval", "run", "--model", name, "--model_args", arguments, *task, "--output_path", out)
        (file,) = out.rglob("results*.json")
        bits[name] = json.loads(file.read_text())["results"]["w4a16_heldout"]["bits_per_byte,none"]
    assert bits["vllm"] == pytest.approx(bits["hf"], rel=1e-3)
