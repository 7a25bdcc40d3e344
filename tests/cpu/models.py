"""Tiny random models of every architecture that w4a16 serves, and their checkpoints in every format.

A checkpoint is made from plain codes, scales and zero points with the packers of formats.py; its oracle is the same
model, dense, in fp32, with the weights that those numbers stand for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from formats import Plain, awq, awq_config, compressed_tensors, ct_config, ct_group, gptq, gptq_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB, GROUP = 96, 32
PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3",
    "in_proj_qkv", "in_proj_z", "out_proj",  # of the gated delta net; its b and a are too narrow to quantise
)  # fmt: skip

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 64,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {},
    "qwen2": {},  # the one with biases on q, k and v
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True},
    "qwen3_moe": {**MOE, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_moe_text": {**MOE, **DELTA},
}


@dataclass(frozen=True)
class Recipe:
    """One way to store a quantised linear layer."""

    method: str
    symmetric: bool
    version: int = 1
    act_order: bool = False
    group: int = GROUP
    dtype: torch.dtype = torch.float16

    def pack(self, plain: Plain) -> dict[str, Tensor]:
        if self.method == "awq":
            return awq(plain)
        if self.method == "gptq":
            return gptq(plain, version=self.version)
        return compressed_tensors(plain, symmetric=self.symmetric)

    def config(self) -> dict[str, Any]:
        if self.method == "awq":
            return awq_config(self.group)
        if self.method == "gptq":
            checkpoint_format = "gptq" if self.version == 1 else "gptq_v2"
            settings = {"sym": self.symmetric, "desc_act": self.act_order, "checkpoint_format": checkpoint_format}
            return gptq_config(self.group, **settings)
        return ct_config(ct_group(self.group, symmetric=self.symmetric))


RECIPES = {
    "awq": Recipe("awq", symmetric=False),
    "gptq": Recipe("gptq", symmetric=True),
    "gptq-asym": Recipe("gptq", symmetric=False),
    "gptq-v2-asym": Recipe("gptq", symmetric=False, version=2),
    "gptq-desc-act": Recipe("gptq", symmetric=True, act_order=True),
    "gptq-desc-act-asym": Recipe("gptq", symmetric=False, act_order=True),
    "ct": Recipe("compressed-tensors", symmetric=True),
    "ct-asym": Recipe("compressed-tensors", symmetric=False),
    "ct-channel": Recipe("compressed-tensors", symmetric=True, group=-1),
}


@dataclass
class Made:
    """A checkpoint, and what it stands for."""

    folder: Path
    tensors: dict[str, Tensor]  # as stored
    oracle: dict[str, Tensor]  # dense fp32, under the names on disk
    quantized: list[str]

    def dense(self, dtype: torch.dtype = torch.float32) -> Any:
        """The oracle as a model of transformers' own."""
        folder = self.folder.parent / f"{self.folder.name}-dense"
        if not folder.exists():
            folder.mkdir()
            save_file(self.oracle, folder / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((self.folder / "config.json").read_text())
            del config["quantization_config"]
            (folder / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def nest_config(self, model_type: str) -> None:
        """Makes config.json that of a multimodal model around this one."""
        text = json.loads((self.folder / "config.json").read_text())
        quantization = text.pop("quantization_config")
        shared = {"dtype": text["dtype"], "tie_word_embeddings": text["tie_word_embeddings"]}
        values = {"model_type": model_type, "text_config": text, "quantization_config": quantization, **shared}
        (self.folder / "config.json").write_text(json.dumps(values))

    def save(self) -> Path:
        """Writes `tensors` again, after a test has changed them."""
        save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        return self.folder


def make_checkpoint(
    arch: str, recipe: Recipe, folder: Path, *, also: tuple[str, ...] = (), dtype: str = "float32", **config: Any
) -> Made:
    """The tiny model `arch` in `folder`, every projection (and `also`) quantised as `recipe` says, the rest dense."""
    settings = AutoConfig.for_model(arch, **{**SIZES, **ARCHITECTURES[arch], **config})
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folder)
    oracle = load_file(folder / "model.safetensors")
    tensors, quantized = dict(oracle), []
    orders: dict[str, Tensor] = {}
    for name, dense in oracle.items():
        module, _, kind = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        if kind != "weight" or projection not in (*PROJECTIONS, *also) or dense.ndim != 2:
            continue
        # gate and up read the same input, so one calibration orders both
        order = orders.setdefault(f"{parent} {dense.shape[1]}", torch.randperm(dense.shape[1]))
        plain = _quantize(*dense.shape, recipe, order)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in recipe.pack(plain).items()}
        oracle[name] = _dequantize(plain)
        quantized.append(module)
        del tensors[name]
    values = json.loads((folder / "config.json").read_text())
    values |= {"dtype": dtype, "quantization_config": recipe.config()}
    (folder / "config.json").write_text(json.dumps(values))
    made = Made(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, oracle, quantized)
    made.save()
    return made


def _quantize(n: int, k: int, recipe: Recipe, order: Tensor) -> Plain:
    group = k if recipe.group == -1 else recipe.group
    g_idx = torch.arange(k) // group
    zeros = torch.full((n, k // group), 8) if recipe.symmetric else torch.randint(0, 16, (n, k // group))
    return Plain(
        codes=torch.randint(0, 16, (n, k)).tolist(),
        zeros=zeros.tolist(),
        scales=((torch.rand(n, k // group) + 0.5) / (5 * k**0.5)).to(recipe.dtype),
        g_idx=(g_idx[order] if recipe.act_order else g_idx).tolist(),
    )


def _dequantize(plain: Plain) -> Tensor:
    """Exact: the product of a 5-bit integer and an 11-bit mantissa fits in fp32."""
    index = torch.tensor(plain.g_idx)
    levels = torch.tensor(plain.codes) - torch.tensor(plain.zeros)[:, index]
    return levels * plain.scales.float()[:, index]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, as many as the models have, with a chat template."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    characters = [chr(code) for code in range(32, 32 + VOCAB - len(special))]
    vocab = {token: index for index, token in enumerate([*special.values(), *characters])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
