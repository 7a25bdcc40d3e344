"""AWQ, GPTQ and compressed-tensors written and read nibble by nibble, from the bit maps of each format's definition.

Slow and obvious on purpose, and sharing no code with w4a16: this is what the readers and writers are tested against.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

AWQ_BITS = (0, 4, 1, 5, 2, 6, 3, 7)  # output column 8c+j of AWQ lies at bits 4 * AWQ_BITS[j] of word c


@dataclass
class Plain:
    """A quantised weight as the formulas see it: W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = g_idx[k]."""

    codes: list[list[int]]  # [N][K]
    zeros: list[list[int]]  # [N][G]
    scales: Tensor  # [N, G]
    g_idx: list[int]  # [K]

    @property
    def size(self) -> tuple[int, int, int]:
        return len(self.codes), len(self.g_idx), self.scales.shape[1]

    def dense(self) -> Tensor:
        index = torch.tensor(self.g_idx)
        levels = torch.tensor(self.codes) - torch.tensor(self.zeros)[:, index]
        return (levels * self.scales.double()[:, index]).to(self.scales.dtype)


def make(
    n: int, k: int, group: int, *, symmetric: bool, act_order: bool = False, act: torch.dtype = torch.float16
) -> Plain:
    groups = k // group
    zeros = torch.full((n, groups), 8) if symmetric else torch.randint(0, 16, (n, groups))
    g_idx = torch.arange(k) // group
    return Plain(
        codes=torch.randint(0, 16, (n, k)).tolist(),
        zeros=zeros.tolist(),
        scales=(torch.rand(n, groups) * 0.05 + 0.01).to(act),
        g_idx=(g_idx[torch.randperm(k)] if act_order else g_idx).tolist(),
    )


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _nibble(word: int, bits: int) -> int:
    return (word >> bits) & 15


def _words(rows: int, columns: int) -> list[list[int]]:
    return [[0] * columns for _ in range(rows)]


def _int32(words: list[list[int]]) -> Tensor:
    return torch.tensor([[_signed(word) for word in row] for row in words], dtype=torch.int32)


def awq(plain: Plain) -> dict[str, Tensor]:
    n, k, groups = plain.size
    qweight, qzeros = _words(k, n // 8), _words(groups, n // 8)
    for column in range(n):
        c, j = divmod(column, 8)
        for row in range(k):
            qweight[row][c] |= plain.codes[column][row] << (4 * AWQ_BITS[j])
        for group in range(groups):
            qzeros[group][c] |= plain.zeros[column][group] << (4 * AWQ_BITS[j])
    return {"qweight": _int32(qweight), "qzeros": _int32(qzeros), "scales": plain.scales.t().contiguous()}


def gptq(plain: Plain, *, version: int) -> dict[str, Tensor]:
    n, k, groups = plain.size
    qweight, qzeros = _words(k // 8, n), _words(groups, n // 8)
    for column in range(n):
        for row in range(k):
            qweight[row // 8][column] |= plain.codes[column][row] << (4 * (row % 8))
        for group in range(groups):
            qzeros[group][column // 8] |= plain.zeros[column][group] << (4 * (column % 8))
    if version == 1:
        qzeros = [[(word - 0x11111111) % (1 << 32) for word in row] for row in qzeros]
    return {
        "qweight": _int32(qweight),
        "qzeros": _int32(qzeros),
        "scales": plain.scales.t().contiguous(),
        "g_idx": torch.tensor(plain.g_idx, dtype=torch.int32),
    }


def compressed_tensors(plain: Plain, *, symmetric: bool, act_order: bool = False) -> dict[str, Tensor]:
    n, k, groups = plain.size
    packed, zeros = _words(n, -(-k // 8)), _words(-(-n // 8), groups)
    for row in range(n):
        for column in range(k):
            packed[row][column // 8] |= plain.codes[row][column] << (4 * (column % 8))
        for group in range(groups):
            zeros[row // 8][group] |= plain.zeros[row][group] << (4 * (row % 8))
    tensors = {"weight_packed": _int32(packed), "weight_scale": plain.scales, "weight_shape": torch.tensor([n, k])}
    if not symmetric:
        tensors["weight_zero_point"] = _int32(zeros)
    if act_order:
        tensors["weight_g_idx"] = torch.tensor(plain.g_idx, dtype=torch.int32)
    return tensors


def read_awq(tensors: dict[str, Tensor]) -> Plain:
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    k, n, groups = len(qweight), 8 * len(qweight[0]), len(qzeros)
    at = [(column // 8, 4 * AWQ_BITS[column % 8]) for column in range(n)]
    return Plain(
        codes=[[_nibble(qweight[row][c], bits) for row in range(k)] for c, bits in at],
        zeros=[[_nibble(qzeros[group][c], bits) for group in range(groups)] for c, bits in at],
        scales=tensors["scales"].t(),
        g_idx=[row * groups // k for row in range(k)],
    )


def read_gptq(tensors: dict[str, Tensor], *, version: int) -> Plain:
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    k, n, groups = 8 * len(qweight), len(qweight[0]), len(qzeros)
    if version == 1:
        qzeros = [[(word + 0x11111111) % (1 << 32) for word in row] for row in qzeros]
    return Plain(
        codes=[[_nibble(qweight[row // 8][column], 4 * (row % 8)) for row in range(k)] for column in range(n)],
        zeros=[[_nibble(qzeros[g][column // 8], 4 * (column % 8)) for g in range(groups)] for column in range(n)],
        scales=tensors["scales"].t(),
        g_idx=tensors["g_idx"].tolist(),
    )


def read_compressed_tensors(tensors: dict[str, Tensor]) -> Plain:
    n, k = tensors["weight_shape"].tolist()
    packed, groups = tensors["weight_packed"].tolist(), tensors["weight_scale"].shape[1]
    zeros = tensors["weight_zero_point"].tolist() if "weight_zero_point" in tensors else None
    return Plain(
        codes=[[_nibble(packed[row][column // 8], 4 * (column % 8)) for column in range(k)] for row in range(n)],
        zeros=[[_nibble(zeros[r // 8][g], 4 * (r % 8)) if zeros else 8 for g in range(groups)] for r in range(n)],
        scales=tensors["weight_scale"],
        g_idx=[column * groups // k for column in range(k)],
    )


def awq_config(group: int, **other: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **other}


def gptq_config(group: int, **other: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": False, "desc_act": False, **other}


def ct_group(group: int, *, targets: tuple[str, ...] = ("Linear",), symmetric: bool, **weights: Any) -> dict[str, Any]:
    channel = group == -1
    args = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "channel" if channel else "group"}
    size = {"group_size": None if channel else group}
    return {"targets": list(targets), "weights": {**args, **size, **weights}, "input_activations": None}


def ct_config(*groups: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": ["lm_head"],
        **other,
    }


def named(modules: dict[str, dict[str, Tensor]], dense: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Companion tensors by module, and dense tensors by name, as one state dict."""
    tensors = {f"{module}.{suffix}": t for module, parts in modules.items() for suffix, t in parts.items()}
    return tensors | (dense or {})


def write_folder(
    folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None, *, shards: int = 1, **config: Any
) -> Path:
    """A checkpoint folder as the usual tools write it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": "qwen3", **config}
    if quantization is not None:
        values["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
