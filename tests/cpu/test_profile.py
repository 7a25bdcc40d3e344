"""`w4a16 profile`: random, quantised and dense models, timed, recorded and reported."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from w4a16.cli import app
from w4a16.errors import BadInput
from w4a16.nn import W4A16Experts, W4A16Linear
from w4a16.roofline.models import SIZES, Prompted, config_of, dense_twin, random_model
from w4a16.roofline.record import Speed, record_generation, time_generation
from w4a16.roofline.report import make_report
from w4a16.roofline.step import step_of
from w4a16.roofline.trace import read

MODELS = Path(__file__).parents[2] / "models"
CPU = torch.device("cpu")
SHORT = ("--prompt-len", "24", "--output-len", "3", "--repeats", "1", "--steps", "1")


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["profile", *(str(a) for a in arguments), *SHORT], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def tiny(name: str = "tiny-qwen3", **options: object) -> torch.nn.Module:
    known = {"group": 128, "symmetric": True, **options}
    return random_model(config_of(str(MODELS / name)), CPU, torch.float32, **known)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-qwen3-moe"])
@torch.inference_mode()
def test_a_random_model_is_its_dense_twin(name: str) -> None:
    model = tiny(name, group=64, symmetric=False)
    kinds = {type(module) for module in model.modules()}
    assert W4A16Linear in kinds
    assert (W4A16Experts in kinds) == name.endswith("moe")
    ids = torch.randint(0, 1024, (2, 16))
    got, wanted = model(ids).logits, dense_twin(model)(ids).logits
    assert torch.isfinite(wanted).all()
    assert wanted.std() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


@torch.inference_mode()
def test_prompted_makes_the_tokens_of_generate() -> None:
    model = tiny()
    prompted = Prompted(model, 2, 16)
    prompted.prefill()
    got = [prompted.last]
    for _ in range(3):
        prompted.decode()
        got.append(prompted.last)
    ids = prompted.ids
    known = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(torch.cat(got, 1), model.generate(ids, **known)[:, 16:])


def test_a_trace_has_both_phases_and_no_warm_up(tmp_path: Path) -> None:
    with torch.inference_mode():
        generation = Prompted(tiny(), 2, 24)
        generation.prefill()
        warm_up = copy.copy(generation).decode
        record_generation(generation, tmp_path / "t.json.gz", where=CPU, steps=2, warm_up=warm_up)
    trace = read(tmp_path / "t.json.gz")
    step = step_of(trace)
    rows = {
        phase: {c.rows for c in step.calls if c.kind == "W4A16" and c.phase == phase} for phase in ("prefill", "decode")
    }
    assert rows == {"prefill": {48}, "decode": {2}}
    decode = make_report(trace, step, None, by="shape", phase="decode")
    calls = {row.name: row.calls for row in decode.rows if row.kind == "W4A16"}
    assert calls["cpu_decode 2x256x768 g=128 sym fp32"] == 2 * 4  # two steps of four layers


def test_speed() -> None:
    speed = Speed(batch=4, prompt=8, output=11, ttft=0.5, tpot=0.05)
    assert speed.tokens_per_s == pytest.approx(44.0)
    assert "TTFT 500.00 ms, TPOT 50.000 ms, 44.0 tokens/s" in speed.sentence()


def test_timing_counts_steps() -> None:
    class Counted:
        prefills = decodes = 0

        def prefill(self) -> None:
            self.prefills += 1

        def decode(self) -> None:
            self.decodes += 1

    counted = Counted()
    time_generation(counted, batch=1, prompt=1, output=5, where=CPU, repeats=2)
    assert (counted.prefills, counted.decodes) == (3, 12)


def test_the_command_on_random_weights_and_dense_ones(tmp_path: Path) -> None:
    trace, html = tmp_path / "t.json.gz", tmp_path / "t.html"
    said = invoke(MODELS / "tiny-qwen3", "--random", "--asym", "--dense", "--trace", trace, "--html", html)
    assert len(re.findall(r"batch 1, prompt 24, output 3: TTFT [\d.]+ ms, TPOT [\d.]+ ms, [\d.]+ tokens/s", said)) == 2
    assert "cpu_prefill 24x768x256 g=128 asym" in said
    assert "cpu_decode 1x768x256 g=128 asym" in said
    assert re.search(r"is [\d.]+ times as fast as with dense weights", said)
    assert said.count("prefill only") == said.count("decode only") == 2
    for name in ("t.html", "t-dense.html"):
        assert "</html>" in (tmp_path / name).read_text(encoding="utf-8")
    assert step_of(read(tmp_path / "t-dense.json.gz")).calls


def test_the_command_on_a_dense_checkpoint() -> None:
    said = invoke(MODELS / "tiny-qwen3", "--by", "layer", "--dtype", "float32", "--top", 99)
    assert "model.layers.3.mlp.down_proj" in said


def test_the_command_on_a_quantised_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "quantised"
    CliRunner().invoke(app, ["quantize", str(MODELS / "tiny-qwen3"), str(out)], catch_exceptions=False)
    said = invoke(out, "--dtype", "float32", "--batch", 2)
    assert "cpu_decode 2x768x256 g=128 sym fp32" in said


def test_known_sizes_are_configs() -> None:
    layers = {name: config_of(name).num_hidden_layers for name in SIZES}
    assert layers == {"qwen3-0.6b": 28, "qwen3-8b": 36, "qwen3-30b-a3b": 48}
    with pytest.raises(BadInput, match="qwen3-8b"):
        config_of("qwen9")


@pytest.mark.parametrize(("option", "value"), [("--by", "colour"), ("--dtype", "int8")])
def test_bad_options_are_one_message(option: str, value: str) -> None:
    with pytest.raises(BadInput, match=f"{option}: got {value}"):
        invoke(MODELS / "tiny-qwen3", option, value)
