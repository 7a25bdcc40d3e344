"""A weight that did not load is an error, and so is whatever w4a16 cannot serve; the hook comes and goes cleanly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, GPTQConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import w4a16
from models import RECIPES, Made, make_checkpoint
from w4a16 import BadCheckpoint, BadInput, Unsupported
from w4a16.plugins import _layers, _names
from w4a16.plugins import transformers as plugin


def drop(made: Made, *starts: str) -> str:
    """The checkpoint without the tensors whose names start so."""
    kept = {name: t for name, t in made.tensors.items() if not name.startswith(starts)}
    assert len(kept) < len(made.tensors)
    made.tensors = kept
    return str(made.save())


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"])
def test_a_missing_dense_tensor(lost: str, tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model")
    with pytest.raises(BadCheckpoint, match=f"1 parameters of Qwen3ForCausalLM did not load: {lost}"):
        w4a16.load(drop(made, lost))


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in made.tensors
    model = w4a16.load(str(made.folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_missing_bias(tmp_path: Path) -> None:
    made = make_checkpoint("qwen2", RECIPES["gptq"], tmp_path / "model")
    with pytest.raises(BadCheckpoint, match=r"did not load: model\.layers\.0\.self_attn\.k_proj\.bias"):
        w4a16.load(drop(made, "model.layers.0.self_attn.k_proj.bias"))


def test_a_missing_quantised_module(tmp_path: Path) -> None:
    made = make_checkpoint("llama", RECIPES["ct"], tmp_path / "model")
    with pytest.raises(BadCheckpoint, match=r"did not load: model\.layers\.0\.mlp\.up_proj\.weight"):
        w4a16.load(drop(made, "model.layers.0.mlp.up_proj."))


def test_a_wrong_shape(tmp_path: Path) -> None:
    made = make_checkpoint("llama", RECIPES["ct"], tmp_path / "model")
    made.tensors["model.norm.weight"] = torch.ones(65)
    with pytest.raises(BadCheckpoint, match=r"did not load: model\.norm\.weight \(65,\), wanted \(64,\)"):
        w4a16.load(str(made.save()))


def test_a_quantised_module_of_the_wrong_size(tmp_path: Path) -> None:
    made = make_checkpoint("llama", RECIPES["ct"], tmp_path / "model")
    config = made.folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 128'))
    with pytest.raises(BadCheckpoint, match=r"down_proj: got \[64, 96\], wanted \[64, 128\]"):
        w4a16.load(str(made.folder))


@pytest.mark.parametrize("recipe", ["awq", "gptq", "ct-asym"])
@pytest.mark.parametrize("lost", ["1", "3"])
def test_a_missing_expert(recipe: str, lost: str, tmp_path: Path) -> None:
    """Where transformers alone would go on with random experts."""
    made = make_checkpoint("qwen3_moe", RECIPES[recipe], tmp_path / "model")
    with pytest.raises(BadCheckpoint, match=rf"layers\.1\.mlp\.experts.* missing .*experts\.{lost} gate"):
        w4a16.load(drop(made, f"model.layers.1.mlp.experts.{lost}."))


def test_all_experts_of_a_layer_missing(tmp_path: Path) -> None:
    made = make_checkpoint("mixtral", RECIPES["gptq"], tmp_path / "model")
    moe = "model.layers.1.block_sparse_moe.experts."
    with pytest.raises(BadCheckpoint, match=r"did not load: model\.layers\.1\.mlp\.experts\.down_proj"):
        w4a16.load(drop(made, moe))


def test_more_layers_than_the_model_has(tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model")
    config = AutoConfig.from_pretrained(made.folder, num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(BadCheckpoint, match=r"Qwen3ForCausalLM has no place: model\.layers\.1\.mlp\.down_proj"):
        w4a16.load(str(made.folder), config=config)


def test_a_quantised_module_that_is_no_linear(tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model", also=("embed_tokens",))
    with pytest.raises(Unsupported, match=r"model\.embed_tokens is quantised, but .* is in a Embedding"):
        w4a16.load(str(made.folder))


def test_experts_that_compute_something_else() -> None:
    config = AutoConfig.for_model("gpt_oss", hidden_size=32, intermediate_size=32, num_local_experts=2)
    with torch.device("meta"), pytest.raises(Unsupported, match="gate_up_proj_bias and down_proj_bias"):
        _layers._activation("model.layers.0.mlp.experts", GptOssExperts(config))
    config = AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=32, num_local_experts=2)
    with torch.device("meta"):
        block = MixtralExperts(config)
        assert _layers._activation("experts", block) == "silu"
        block.act_fn = nn.Hardswish()
        with pytest.raises(Unsupported, match="an activation that is none of silu, gelu"):
            _layers._activation("experts", block)
        block._apply_gate = lambda x: x.chunk(2, -1)[0].clamp(max=7).sigmoid()  # type: ignore[assignment]
        with pytest.raises(Unsupported, match="none of"):
            _layers._activation("experts", block)


def test_a_checkpoint_that_is_not_quantised(tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model")
    made.dense()
    with pytest.raises(Unsupported, match="no quantization_config"):
        w4a16.load(str(tmp_path / "model-dense"))


def test_a_truncated_file(tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model")
    file = made.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="truncated"):
        w4a16.load(str(made.folder))


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}])
def test_offload(device_map: dict[str, object], tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model")
    with pytest.raises(Unsupported, match="wanted no offload"):
        w4a16.load(str(made.folder), device_map=device_map, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}])
def test_device_maps_of_one_device(device_map: object, tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model")
    assert {p.device.type for p in w4a16.load(str(made.folder), device_map=device_map).parameters()} == {"cpu"}


def test_the_hook_leaves_no_trace() -> None:
    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    plugin.enable()
    plugin.enable()
    assert AUTO_QUANTIZER_MAPPING["awq"] is not before[1]["awq"]
    plugin.disable()
    plugin.disable()
    assert before == (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)


def test_other_schemes_stay_transformers_own() -> None:
    plugin.enable()
    try:
        read = AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].from_dict
        assert isinstance(read({"quant_method": "gptq", "bits": 8}), GPTQConfig)
        assert isinstance(read({"quant_method": "gptq", "bits": 4}), plugin.W4A16Config)
    finally:
        plugin.disable()


def test_a_name_that_transformers_no_longer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_names, "NAMES", {"transformers.core_model_loading": ("rename_the_key",)})
    _names.private.cache_clear()
    with pytest.raises(Unsupported, match=r"has no transformers\.core_model_loading\.rename_the_key"):
        _names.private()
    _names.private.cache_clear()


def test_a_hub_id_that_is_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="got no/such-model, wanted a folder"):
        w4a16.load("no/such-model", cache_dir=tmp_path, local_files_only=True)


def test_a_hub_id_in_the_cache(tmp_path: Path) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model")
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    made.folder.rename(repository / "snapshots" / commit)
    model = w4a16.load("some/model", cache_dir=tmp_path / "cache", local_files_only=True)
    assert model.config.name_or_path == "some/model"
