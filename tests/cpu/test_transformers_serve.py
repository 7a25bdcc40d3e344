"""The server for real: another process on the loopback address, asked over HTTP, stopped with a signal."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

import w4a16
from models import RECIPES, make_checkpoint, make_tokenizer

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs the extra w4a16[serve]")
START_S, STOP_S, TOKENS = 120, 5, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    made = make_checkpoint("qwen3", RECIPES["ct-asym"], tmp_path_factory.mktemp("served") / "model")
    make_tokenizer().save_pretrained(made.folder)
    return made.folder


@pytest.fixture(scope="module", params=[(), ("--continuous-batching", "--cb-num-blocks", "16")], ids=["plain", "cb"])
def address(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    argv = [str(folder), "--host", "127.0.0.1", "--port", port, "--device", "cpu", *request.param]
    code = "import sys; from w4a16.plugins.transformers import serve; serve(sys.argv[1:])"
    log = folder.parent / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", code, *argv], stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(server, url, log)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            # transformers leaves the thread of continuous batching running at shutdown
            assert request.param
            server.kill()
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


def post(url: str, **body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_completions(address: str, folder: Path) -> None:
    answer = post(
        f"{address}/v1/completions", model=str(folder), prompt="hello", max_tokens=TOKENS, temperature=0, seed=0
    )
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": TOKENS, "total_tokens": 5 + TOKENS}
    tokenizer = make_tokenizer()
    ids = tokenizer("hello", return_tensors="pt")
    out = w4a16.load(str(folder)).generate(**ids, max_new_tokens=TOKENS, do_sample=False)
    assert answer["choices"][0]["text"] == tokenizer.decode(out[0, 5:], skip_special_tokens=True)


def test_chat(address: str, folder: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = post(f"{address}/v1/chat/completions", model=str(folder), messages=messages, max_tokens=TOKENS)
    assert answer["usage"]["completion_tokens"] == TOKENS
