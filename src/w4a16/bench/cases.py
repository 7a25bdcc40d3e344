"""The shapes that are measured: every quantised layer of known models, and any NxK."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import BadInput, explain_mismatch

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer: y[M, N] = x[M, K] @ W[N, K]^T with `group` columns a scale."""

    name: str
    n: int
    k: int
    group: int = 128


# Model -> its layers as (layer, N, K), and the group its published checkpoints use.
_MODELS: dict[str, tuple[int, tuple[tuple[str, int, int], ...]]] = {
    "gemma-2b": (128, (("gate_up", 32768, 2048), ("down", 2048, 16384), ("qkv", 2560, 2048), ("o", 2048, 2048))),
    "kernel-set": (128, (("38912", 2048, 38912), ("49152", 2048, 49152), ("49152-wide", 4096, 49152))),
    "qwen3-1.7b": (128, (("qkv", 4096, 2048), ("gate_up", 12288, 2048), ("down", 2048, 6144))),
    "qwen3-4b": (128, (("qkv", 6144, 2560), ("o", 2560, 4096), ("gate_up", 19456, 2560), ("down", 2560, 9728))),
    "qwen3-vl-4b": (32, (("qkv", 6144, 2560), ("o", 2560, 4096), ("gate_up", 19456, 2560), ("down", 2560, 9728))),
    "qwen3-8b": (128, (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 24576, 4096), ("down", 4096, 12288))),
    "qwen3.5-35b-a3b": (128, (("gdn_out", 2048, 4096),)),
    "qwen2.5-0.5b": (128, (("gate_up", 9728, 896),)),
    "qwen2.5-7b": (128, (("qkv", 4608, 3584), ("o", 3584, 3584), ("gate_up", 37888, 3584), ("down", 3584, 18944))),
    "qwen2.5-vl-3b": (128, (("gate_up", 22016, 2048), ("down", 2048, 11008))),
    "llama2-7b": (128, (("qkv", 12288, 4096), ("o", 4096, 4096), ("gate_up", 22016, 4096), ("down", 4096, 11008))),
    "llama3-8b": (128, (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336))),
    "smollm2-1.7b": (32, (("qkv", 6144, 2048), ("o", 2048, 2048), ("gate_up", 16384, 2048), ("down", 2048, 8192))),
    "gemma3-4b": (128, (("qkv", 4096, 2560), ("gate_up", 20480, 2560), ("down", 2560, 10240))),
    "gemma4-31b": (
        32,
        (
            ("gate_up", 43008, 5376),
            ("down", 5376, 21504),
            ("qkv", 16384, 5376),
            ("o", 5376, 8192),
            ("o-global", 5376, 16384),
            ("qkv-global", 20480, 5376),
        ),
    ),
    "l2-boundary": (128, (("8192", 512, 8192), ("8320", 512, 8320))),
    "lm-head": (128, (("qwen3", 151936, 2560), ("qwen2.5", 152064, 3584))),
}

MODELS = {
    model: tuple(Shape(name=f"{model}.{layer}", n=n, k=k, group=group) for layer, n, k in layers)
    for model, (group, layers) in _MODELS.items()
}


def shapes_of(names: str) -> tuple[Shape, ...]:
    """Shapes from a comma-separated list of models and NxK; `8b` is the three shapes of most tables here.

    Raises BadInput that lists the models when a name is neither.
    """
    found: list[Shape] = []
    for name in names.split(","):
        if name == "8b":
            layers = {shape.name: shape for shape in MODELS["qwen3-8b"]}
            found += [layers[f"qwen3-8b.{layer}"] for layer in ("gate_up", "down", "o")]
        elif name in MODELS:
            found += MODELS[name]
        elif match := re.fullmatch(r"(\d+)x(\d+)", name):
            found.append(Shape(name=name, n=int(match[1]), k=int(match[2])))
        else:
            wanted = f"8b, NxK, {', '.join(MODELS)}"
            raise BadInput(explain_mismatch("shapes", got=name, wanted=wanted, then="Name some of these."))
    return tuple(found)
