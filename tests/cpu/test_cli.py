"""The command line: each command on the shipped models, and one clean message at bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import w4a16.demo
from w4a16.checkpoints import open_checkpoint
from w4a16.cli import app, main

MODELS = Path(__file__).parents[2] / "models"
DENSE = MODELS / "tiny-qwen3"


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "quantized"
    said = invoke("quantize", DENSE, out, "--group-size", 64, "--asym")
    assert "28 weights in 4 bits" in said
    assert "left dense: lm_head (output embedding)" in said
    return out


def test_convert(quantized: Path, tmp_path: Path) -> None:
    assert "as awq" in invoke("convert", quantized, tmp_path / "awq", "--to", "awq")
    with open_checkpoint(tmp_path / "awq") as checkpoint:
        assert checkpoint.format == "awq"


def test_report(quantized: Path) -> None:
    said = invoke("report", quantized, "--dense-cache", "soft")
    assert "model.layers.0.self_attn.q_proj" in said
    assert "copy: none: no tuning row of cpu makes it faster than the 4-bit kernels" in said
    assert "dense copies 0.0 MB" in said


def test_generate(quantized: Path) -> None:
    assert "import os" in invoke("generate", quantized, "--prompt", "import os", "--max-new-tokens", 4)


def test_eval(quantized: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    text = MODELS / "heldout.txt"
    said = invoke("eval", quantized, "--dense", DENSE, "--text", text, "--max-tokens", 512, "--json", figures)
    assert "kl_per_token" in said
    found = json.loads(figures.read_text())
    assert found["tokens"] == 511
    assert 0 < found["kl_per_token"] < 0.2
    assert found["top1_agreement"] > 0.8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--m", 1, "--n", 4096, "--k", 4096], "kernel cpu_decode"),
        (["--m", 512, "--n", 4096, "--k", 4096, "--asym", "--act", "fp16"], "kernel cpu_prefill"),
        (["--m", 1, "--n", 4096, "--k", 4096, "--group", -1, "--device", "gfx1151"], "kernel triton_decode"),
        (["--m", 4, "--n", 1536, "--k", 2048, "--experts", 128, "--top-k", 8], "kernel cpu_moe"),
    ],
)
def test_explain(arguments: list[object], words: str) -> None:
    assert words in invoke("explain", *arguments)


def test_explain_exits_1_without_a_kernel() -> None:
    arguments = ["explain", "--m", "1", "--n", "64", "--k", "128", "--experts", "4", "--top-k", "2", "--device", "sm90"]
    arguments += ["--act", "fp32"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "No kernel serves this" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "--m", "1", "--n", "64", "--k", "64", "--group", "48"], "group"),
        (["quantize", "nowhere", "out"], "nowhere"),
        (["convert", str(DENSE), "out"], "not quantised"),
        (["eval", "nowhere", "--dense", str(DENSE), "--text", "no.txt"], "no.txt"),
        (["generate", "nowhere"], "nowhere"),
        (["profile", "./nowhere"], "got ./nowhere, wanted a folder"),
        (["serve", "./nowhere"], "got ./nowhere, wanted a folder"),
        (["bench", "--shapes", "64x64", "--batches", "x"], "got x, wanted numbers"),
        (["isa", "--kernel", "nothing", "--device", "sm90"], "got nothing, wanted sm90_decode"),
        (["isa", "--kernel", "sm90_decode", "--device", "sm90", "--m", "100"], "m must be at most 16"),
        (["isa", "--kernel", "sm90_prefill", "--device", "sm90", "--tile", "block_m=7"], "block_m must be"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["w4a16", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-qwen3-moe"])
def test_demo(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / model).symlink_to(MODELS / model)
    (tmp_path / "models" / "heldout.txt").symlink_to(MODELS / "heldout.txt")
    for name, value in {"NEW_TOKENS": 8, "EVAL_TOKENS": 256, "REPEATS": 1, "SCHEMES": w4a16.demo.SCHEMES[1:]}.items():
        monkeypatch.setattr(w4a16.demo, name, value)
    said = invoke("demo", "--models", tmp_path / "models", "--work", tmp_path / "work")
    assert "8 of 8" in said
    assert "decode by" in said
