"""Every served architecture from every format, through `w4a16.load` and through transformers' own from_pretrained."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_rms
from torch import Tensor
from transformers import AutoModelForCausalLM

import w4a16
from models import ARCHITECTURES, RECIPES, VOCAB, Recipe, make_checkpoint
from w4a16 import unpack
from w4a16.nn import W4A16Experts, W4A16Linear
from w4a16.plugins import transformers as plugin

BF16_BOUND = 5e-2  # bf16 activations through two layers
MOE = [arch for arch in ARCHITECTURES if arch.endswith(("moe", "mixtral", "moe_text"))]


@pytest.fixture
def hook() -> Iterator[None]:
    plugin.enable()
    yield
    plugin.disable()


def prompt(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length))


def greedy(model: Any, ids: Tensor, **settings: Any) -> list[list[int]]:
    out: list[list[int]] = model.generate(ids, max_new_tokens=5, do_sample=False, **settings).tolist()
    return out


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.usefixtures("hook")
def test_the_tokens_are_those_of_the_dequantised_model(arch: str, recipe: str, tmp_path: Path) -> None:
    made = make_checkpoint(arch, RECIPES[recipe], tmp_path / "model")
    dense, loaded = made.dense(), w4a16.load(str(made.folder))
    stock = AutoModelForCausalLM.from_pretrained(made.folder)
    ids = prompt()
    wanted = logits(dense, ids)
    assert relative_rms(logits(loaded, ids), wanted) < 1e-5
    assert torch.equal(logits(loaded, ids), logits(stock, ids))
    assert greedy(stock, ids) == greedy(dense, ids)
    stored = loaded.state_dict()
    assert not [name for name in made.quantized if f"{name}.weight" in stored]
    ours = [module for module in loaded.modules() if isinstance(module, W4A16Linear | W4A16Experts)]
    per_block = sum(module.num_experts * 3 - 1 for module in ours if isinstance(module, W4A16Experts))
    assert len(ours) + per_block == len(made.quantized)
    assert (per_block > 0) == (arch in MOE)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_in_bf16_the_logits_are_close(arch: str, tmp_path: Path) -> None:
    """The scales on disk are fp16: they are cast to the activations' dtype when packed."""
    made = make_checkpoint(arch, RECIPES["gptq-asym"], tmp_path / "model", dtype="bfloat16")
    model = w4a16.load(str(made.folder))
    assert model.dtype == torch.bfloat16
    ids = prompt()
    got, wanted = logits(model, ids).float().flatten(0, 1), logits(made.dense(), ids).flatten(0, 1)
    # the median token: where two experts are nearly level, rounding picks another one and moves a whole row
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < BF16_BOUND


def test_the_weights_are_the_stored_ones(tmp_path: Path) -> None:
    made = make_checkpoint("qwen3_moe", RECIPES["awq"], tmp_path / "model")
    model = w4a16.load(str(made.folder))
    query = "model.layers.1.self_attn.q_proj"
    assert torch.equal(unpack(model.get_submodule(query).get()).dequantize(), made.oracle[f"{query}.weight"])
    block = "model.layers.0.mlp.experts"
    w13 = unpack(model.get_submodule(block).w13.get()).dequantize()
    w2 = unpack(model.get_submodule(block).w2.get()).dequantize()
    for expert in range(4):
        gate, up, down = (made.oracle[f"{block}.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert torch.equal(w13[expert], torch.cat([gate, up]))
        assert torch.equal(w2[expert], down)


@pytest.mark.parametrize("arch", ["qwen2", "mixtral"])
def test_transformers_reports_nothing(arch: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = make_checkpoint(arch, RECIPES["ct-asym"], tmp_path / "model")
    w4a16.load(str(made.folder))
    said = "".join(capfd.readouterr())
    assert "Packing weights" in said
    assert not [word for word in ("REPORT", "UNEXPECTED", "MISSING", "[transformers]") if word in said]


def test_dtype_is_the_callers_or_the_configs(tmp_path: Path) -> None:
    made = make_checkpoint("qwen2", RECIPES["ct"], tmp_path / "model")
    assert w4a16.load(str(made.folder)).dtype == torch.float32
    model = w4a16.load(str(made.folder), dtype=torch.float16)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.scales.dtype, layer.bias.dtype) == (torch.float16, torch.float16)
    with pytest.raises(w4a16.Unsupported, match=r"dtype: got torch\.float64"):
        w4a16.load(str(made.folder), dtype=torch.float64)


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_a_layer_that_the_checkpoint_keeps_dense_stays_dense(arch: str, tmp_path: Path) -> None:
    made = make_checkpoint(arch, RECIPES["ct-asym"], tmp_path / "model")
    first = [name for name in made.quantized if ".layers.0." in name]
    made.tensors = {k: v for k, v in made.tensors.items() if k.rpartition(".")[0] not in first}
    made.tensors |= {f"{name}.weight": made.oracle[f"{name}.weight"] for name in first}
    model = w4a16.load(str(made.save()))
    kinds = [{type(m) for m in layer.modules()} & {W4A16Linear, W4A16Experts} for layer in model.model.layers]
    assert not kinds[0]
    assert kinds[1]
    ids = prompt()
    assert relative_rms(logits(model, ids), logits(made.dense(), ids)) < 1e-5


def test_a_quantised_head_is_not_tied(tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model", also=("lm_head",))
    dense = made.dense()
    config = made.folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    model = w4a16.load(str(made.folder))
    assert isinstance(model.lm_head, W4A16Linear)
    ids = prompt()
    assert greedy(model, ids) == greedy(dense, ids)


def test_a_multimodal_checkpoint_loads_as_its_language_model(tmp_path: Path) -> None:
    """Names below model.language_model, and modules that the class says it drops, quantised or not."""
    made = make_checkpoint("qwen3_5_moe_text", RECIPES["ct-asym"], tmp_path / "model")
    dense = made.dense()
    extra = "mtp.layers.0.mlp.experts.0.gate_proj"
    layer = next(name for name in made.quantized if name.endswith("experts.0.gate_proj"))
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in made.tensors.items()}
    tensors |= {k.replace(layer, extra): v.clone() for k, v in made.tensors.items() if k.startswith(f"{layer}.")}
    made.tensors = tensors | {"model.visual.blocks.0.attn.proj.weight": torch.zeros(4, 4)}
    made.nest_config("qwen3_5_moe")
    model = w4a16.load(str(made.save()))
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    ids = prompt()
    assert greedy(model, ids) == greedy(dense, ids)


def test_biases_of_zeros_that_old_gptq_files_hold_are_dropped(tmp_path: Path) -> None:
    made = make_checkpoint("llama", RECIPES["gptq"], tmp_path / "model")
    made.tensors |= {f"{name}.bias": torch.zeros(made.oracle[f"{name}.weight"].shape[0]) for name in made.quantized}
    model = w4a16.load(str(made.save()))
    assert model.model.layers[0].self_attn.q_proj.bias is None
    made.tensors["model.layers.1.mlp.up_proj.bias"][3] = 0.5
    with pytest.raises(w4a16.BadCheckpoint, match=r"layers\.1\.mlp\.up_proj\.bias: got a bias"):
        w4a16.load(str(made.save()))


@pytest.mark.parametrize(("arch", "recipe", "saved"), [
    ("qwen2", "ct-asym", "compressed-tensors"),
    ("mixtral", "awq", "compressed-tensors"),
    ("qwen3_moe", "gptq-desc-act-asym", "gptq"),
])  # fmt: skip
def test_save_pretrained_writes_what_loads_again(arch: str, recipe: str, saved: str, tmp_path: Path) -> None:
    made = make_checkpoint(arch, RECIPES[recipe], tmp_path / "model")
    model = w4a16.load(str(made.folder))
    model.save_pretrained(tmp_path / "saved")
    again = w4a16.load(str(tmp_path / "saved"))
    assert again.config.quantization_config.quant_method == saved
    ids = prompt()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_loaded_model_copies_and_pickles(tmp_path: Path) -> None:
    model = w4a16.load(str(make_checkpoint("qwen3_moe", RECIPES["awq"], tmp_path / "model").folder))
    ids = prompt()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), logits(model, ids))


def test_experts_with_the_tanh_gelu(tmp_path: Path) -> None:
    made = make_checkpoint("mixtral", Recipe("gptq", symmetric=True), tmp_path / "m", hidden_act="gelu_pytorch_tanh")
    model = w4a16.load(str(made.folder))
    assert model.model.layers[0].mlp.experts.activation == "gelu_tanh"
    ids = prompt()
    assert relative_rms(logits(model, ids), logits(made.dense(), ids)) < 1e-5
