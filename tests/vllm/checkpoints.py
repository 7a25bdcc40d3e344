"""The shipped tiny models, quantised in every way that a checkpoint can store, and their dequantised selves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from w4a16.checkpoints import Scheme, convert, open_checkpoint, write_checkpoint
from w4a16.checkpoints.convert import dense_modules
from w4a16.demo import fill_dense
from w4a16.quantize import plan, quantize, quantize_model
from w4a16.weight import QuantizedWeight

MODELS = Path(__file__).parents[2] / "models"
DENSE, MOE = "tiny-qwen3", "tiny-qwen3-moe"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Recipe:
    """order: None, "shared" (projections that read one input are sorted alike), or "own" (each in its own way).

    head: the output embedding is untied from the input's, and quantised.
    """

    format: str
    symmetric: bool
    group: int
    order: str | None = None
    head: bool = False


RECIPES = {
    "ct-sym-g128": Recipe("compressed-tensors", True, 128),
    "ct-asym-g32": Recipe("compressed-tensors", False, 32),
    "ct-sym-channel": Recipe("compressed-tensors", True, -1),
    "awq-asym-g32": Recipe("awq", False, 32),
    "gptq-sym-g128": Recipe("gptq", True, 128),
    "gptq-asym-g32": Recipe("gptq", False, 32),
    "gptq-sym-desc-act": Recipe("gptq", True, 32, "shared"),
    "gptq-asym-desc-act": Recipe("gptq", False, 32, "shared"),
    "gptq-sym-desc-act-own": Recipe("gptq", True, 32, "own"),
    "gptq-asym-head": Recipe("gptq", False, 32, head=True),
}


def make(model: str, recipe: Recipe, out: Path) -> Path:
    """A checkpoint of a shipped model; one that is there already is taken as it is."""
    if (out / "config.json").exists():
        return out
    if recipe.order is not None or recipe.head:
        return _gptq(MODELS / model, recipe, out)
    first = out if recipe.format == "compressed-tensors" else out.with_name(f"{out.name}-source")
    quantize_model(MODELS / model, first, group=recipe.group, symmetric=recipe.symmetric)
    if first != out:
        convert(first, out, to=recipe.format)
    return out


def _gptq(source: Path, recipe: Recipe, out: Path) -> Path:
    """What `w4a16 quantize` does not write: columns in an order (here drawn by lot), a quantised output embedding."""
    orders: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def quantized(module: str, tensor: Tensor) -> QuantizedWeight:
        settings: dict[str, Any] = {"group": recipe.group, "symmetric": recipe.symmetric}
        if recipe.order is None:
            return quantize(tensor, **settings)
        key = module if recipe.order == "own" else f"{module.rpartition('.')[0]} {tensor.shape[1]}"
        perm = orders.setdefault(key, torch.randperm(tensor.shape[1], generator=generator))
        return replace(quantize(tensor[:, perm], **settings), perm=perm)

    with open_checkpoint(source) as checkpoint:
        linear = set(plan(checkpoint, group=recipe.group).linear)

        def items() -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
            for name in checkpoint.dense:
                tensor, module = checkpoint.tensor(name), name.removesuffix(".weight")
                yield (module, quantized(module, tensor)) if name in linear else (name, tensor)
            if recipe.head:
                yield "lm_head", quantized("lm_head", checkpoint.tensor(EMBEDDING))

        ignore = [name for name in dense_modules(checkpoint, linear) if not (recipe.head and name == "lm_head")]
        write_checkpoint(
            out,
            format="gptq",
            config={**checkpoint.config, "tie_word_embeddings": not recipe.head},
            scheme=Scheme(recipe.group, recipe.symmetric, recipe.order is not None),
            items=items(),
            ignore=ignore,
            extra_files_from=source,
        )
    return out


def dequantized(model: str, folder: Path, out: Path) -> Path:
    """The dense checkpoint that `folder` stands for, in fp32."""
    if not (out / "config.json").exists():
        tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
        dense = AutoModelForCausalLM.from_pretrained(MODELS / model, dtype=torch.float32, tie_word_embeddings=tied)
        with open_checkpoint(folder) as checkpoint:
            fill_dense(dense, checkpoint)
        dense.save_pretrained(out)
        AutoTokenizer.from_pretrained(MODELS / model).save_pretrained(out)
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == "float32"
    return out


@dataclass(frozen=True)
class Oracle:
    """A dense model in transformers: what it says after any tokens."""

    model: Any

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> Tensor:
        """fp32 [len(ids), vocabulary]: of each next token."""
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), dim=-1)

    @classmethod
    def of(cls, folder: Path) -> Oracle:
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
