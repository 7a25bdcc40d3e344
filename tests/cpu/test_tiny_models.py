"""The two models under models/ are what models/README.md says."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MODELS = Path(__file__).parents[2] / "models"
HELD_OUT = (MODELS / "heldout.txt").read_text(encoding="utf-8")
NAMES = ("tiny-qwen3", "tiny-qwen3-moe")
# 10 % above the 17.8 and 15.2 measured on the slice; the whole of heldout.txt is in models/README.md
MOST_PERPLEXITY = {"tiny-qwen3": 19.6, "tiny-qwen3-moe": 16.7}
CLASSES = {"tiny-qwen3": "Qwen3ForCausalLM", "tiny-qwen3-moe": "Qwen3MoeForCausalLM"}


def load(name: str) -> PreTrainedModel:
    # bf16 matrix products are 60 times slower than fp32 on a CPU without bf16 units
    return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32, local_files_only=True)


def tensors(name: str) -> dict[str, torch.Tensor]:
    with safe_open(MODELS / name / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, safe_open is no dict


@pytest.mark.parametrize("name", NAMES)
def test_held_out_perplexity(name: str) -> None:
    model = load(name)
    assert type(model).__name__ == CLASSES[name]
    ids = AutoTokenizer.from_pretrained(MODELS / name, local_files_only=True).encode(HELD_OUT, verbose=False)
    windows = torch.tensor(ids[8192 : 8192 + 2048]).view(8, 256)
    with torch.no_grad():
        perplexity = model(windows, labels=windows).loss.exp().item()
    assert perplexity < MOST_PERPLEXITY[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [HELD_OUT, "def f(x):\n\treturn 'é☃', x  # a , b .\r\n\n\n  ", "<|endoftext|>", ""])
def test_tokenizer_round_trip(name: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name, local_files_only=True)
    assert tokenizer.decode(tokenizer.encode(text, verbose=False)) == text


def test_one_tokenizer() -> None:
    dense, moe = ((MODELS / name / "tokenizer.json").read_bytes() for name in NAMES)
    assert dense == moe
    tokenizer = AutoTokenizer.from_pretrained(MODELS / NAMES[0], local_files_only=True)
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("name", NAMES)
def test_every_k_fits_group_128(name: str) -> None:
    matrices = {key: tensor for key, tensor in tensors(name).items() if tensor.ndim == 2}
    assert matrices
    assert not [key for key, tensor in matrices.items() if tensor.shape[1] % 128]
    assert {tensor.dtype for tensor in matrices.values()} == {torch.bfloat16}


def test_experts_are_separate_on_disk() -> None:
    keys = tensors("tiny-qwen3-moe").keys()
    for layer in range(3):
        for expert in range(8):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                assert f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight" in keys


@pytest.mark.parametrize("name", NAMES)
def test_size(name: str) -> None:
    assert 6e6 < sum(path.stat().st_size for path in (MODELS / name).iterdir()) < 8e6
    assert 90e3 < (MODELS / "heldout.txt").stat().st_size < 100e3
