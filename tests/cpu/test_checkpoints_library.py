"""The compressed-tensors library as the oracle of its own format: our files there, its files here, difference 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import formats
import pytest
import torch
from helpers import random_weight
from safetensors.torch import load_file
from torch import Tensor

from w4a16.checkpoints import Scheme, open_checkpoint, write_checkpoint
from w4a16.weight import QuantizedWeight

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config

CASES = [(group, symmetric) for group in (32, 64, 128, -1) for symmetric in (True, False)]


def decompressed(folder: Path, names: Sequence[str], n: int, k: int) -> dict[str, Tensor]:
    """The dense weights that the library makes of a folder: it reads the configuration and picks each scheme itself."""
    with open_checkpoint(folder) as checkpoint:
        config = QuantizationConfig.model_validate(checkpoint.config["quantization_config"])
    model = torch.nn.Module()
    for name in (*names, "lm_head"):
        model.add_module(name, torch.nn.Linear(k, n, bias=False))
    apply_quantization_config(model, config, show_progress=False)
    assert not hasattr(model.lm_head, "quantization_scheme")
    tensors = load_file(folder / "model.safetensors")
    dense = {}
    for name in names:
        parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        scheme = model.get_submodule(name).quantization_scheme
        dense[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return dense


def write(
    folder: Path,
    items: Iterable[tuple[str, Tensor | QuantizedWeight]],
    scheme: Scheme,
    config: dict[str, Any] | None = None,
) -> None:
    write_checkpoint(
        folder, format="compressed-tensors", config=config or {}, scheme=scheme, items=items, ignore=["lm_head"]
    )


@pytest.mark.parametrize(("group", "symmetric"), CASES)
@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16])
def test_the_library_dequantises_what_we_write(tmp_path: Path, group: int, symmetric: bool, act: torch.dtype) -> None:
    n, k = 44, 256  # 44: the zero points of the last word are padding
    weight = random_weight(n, k, group=k if group == -1 else group, asym=not symmetric, act=act)
    write(tmp_path / "out", [("a", weight)], Scheme(group, symmetric))
    dense = decompressed(tmp_path / "out", ["a"], n, k)["a"]
    assert dense.dtype == act
    assert (weight.dequantize() - dense).abs().max() == 0


def test_the_library_picks_the_schemes_of_a_mixed_model(tmp_path: Path) -> None:
    n, k = 16, 256
    weights = {
        "a": random_weight(n, k, group=64),
        "b": random_weight(n, k, group=32, asym=True),
        "c": random_weight(n, k, group=64),
        "d": random_weight(n, k, group=k),
    }
    write(tmp_path / "out", weights.items(), Scheme(64, True))
    dense = decompressed(tmp_path / "out", list(weights), n, k)
    assert all((weights[name].dequantize() - dense[name]).abs().max() == 0 for name in weights)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert {name: checkpoint.plan(name).group for name in weights} == {"a": 64, "b": 32, "c": 64, "d": k}


@pytest.mark.parametrize(("group", "symmetric"), CASES)
def test_we_dequantise_what_the_library_writes(tmp_path: Path, group: int, symmetric: bool) -> None:
    n, k = 44, 256
    args: dict[str, Any] = formats.ct_group(group, symmetric=symmetric)
    scheme = QuantizationScheme.model_validate(args)
    grid = (n, k // (k if group == -1 else group))
    state = {"weight": torch.randn(n, k).bfloat16(), "weight_scale": (torch.rand(grid) + 0.1).bfloat16()}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, grid, dtype=torch.int8)
    parts = PackedQuantizationCompressor.compress(state, scheme)
    formats.write_folder(tmp_path, formats.named({"a": parts}), formats.ct_config(args))
    with open_checkpoint(tmp_path) as checkpoint:
        weight = checkpoint.weight("a")
    assert weight.has_zeros != symmetric
    assert (weight.dequantize() - PackedQuantizationCompressor.decompress(parts, scheme)["weight"]).abs().max() == 0


def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = {
        name: random_weight(*module.weight.shape, group=64)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    dense = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in weights}
    write(tmp_path / "out", [*dense.items(), *weights.items()], Scheme(64, True), config.to_dict())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.bfloat16,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    for name, weight in weights.items():
        assert (loaded.get_submodule(name).weight - weight.dequantize()).abs().max() == 0, name
