"""Models of transformers to profile: random weights in 4 bits from a config alone, a dense twin, a prompt."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..api import pack
from ..errors import BadInput, explain_mismatch
from ..layouts import PackedWeight, unpack
from ..nn import W4A16Experts, W4A16Linear
from ..plugins._layers import swap
from ..plugins._places import ExpertNames, Places
from ..quantize import MIN_ROWS
from ..weight import CODES_PER_WORD, QuantizedWeight

_QWEN3 = {"head_dim": 128, "vocab_size": 151936, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
# Name -> the model type and sizes of its config.json.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, {**_QWEN3, **sizes})
    for name, kind, sizes in (
        (
            "qwen3-0.6b",
            "qwen3",
            {
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "tie_word_embeddings": True,
            },
        ),
        (
            "qwen3-8b",
            "qwen3",
            {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "tie_word_embeddings": False,
            },
        ),
        (
            "qwen3-30b-a3b",
            "qwen3_moe",
            {
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "tie_word_embeddings": False,
            },
        ),
    )
}


def config_of(name: str) -> Any:
    """The config of a known size, or of a folder's config.json. Raises BadInput for any other name."""
    if name in SIZES:
        kind, sizes = SIZES[name]
        return AutoConfig.for_model(kind, **sizes)
    if not Path(name, "config.json").is_file():
        wanted = f"{', '.join(SIZES)} or a folder with a config.json"
        raise BadInput(explain_mismatch("--random", got=name, wanted=wanted, then="Name one of these."))
    config = AutoConfig.from_pretrained(name)
    return _without_quantization(config)


def _without_quantization(config: Any) -> Any:
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def random_model(config: Any, where: torch.device, act: torch.dtype, *, group: int, symmetric: bool) -> Any:
    """The model of a config on `where`, its Linear layers and experts in 4 bits, all weights random.

    Dense copies of what is in 4 bits are never made. The output embedding stays dense.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=act)
    places = _places(model, group)
    swap(model, places, act)
    model.to_empty(device=where)
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    for name in places.linears:
        layer = model.get_submodule(name)
        shape = (layer.out_features, layer.in_features)
        layer.set(_random_weight(shape, group, symmetric, where, act))
    for name, found in places.experts.items():
        upper = (found.experts, 2 * found.intermediate, found.hidden)
        lower = (found.experts, found.hidden, found.intermediate)
        weights = (_random_weight(shape, group, symmetric, where, act) for shape in (upper, lower))
        model.get_submodule(name).set(*weights)
    return model.eval()


def _places(model: Any, group: int) -> Places:
    """What `w4a16 quantize` would put into 4 bits."""
    places = Places()
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            n, k = module.weight.shape
            if n >= MIN_ROWS and n % CODES_PER_WORD == 0 and k % group == 0:
                places.linears[name] = name
        elif getattr(getattr(module, "down_proj", None), "ndim", 0) == 3:
            experts, hidden, intermediate = module.down_proj.shape
            places.experts[name] = ExpertNames(experts=experts, hidden=hidden, intermediate=intermediate)
    return places


def _random_weight(
    shape: tuple[int, ...], group: int, symmetric: bool, where: torch.device, act: torch.dtype
) -> PackedWeight:
    """A weight of about the size that an initialised one has."""
    *lead, n, k = shape
    grid = (*lead, n, k // group)
    weight = QuantizedWeight(
        codes=torch.randint(-(1 << 31), 1 << 31, (*lead, n, k // CODES_PER_WORD), dtype=torch.int32, device=where),
        scales=(torch.rand(grid, device=where) * 0.002 + 0.003).to(act),
        zeros=None if symmetric else torch.randint(0, 16, grid, dtype=torch.uint8, device=where),
        group=group,
    )
    return pack(weight, device=where, act=act)


def dense_twin(model: Any) -> Any:
    """The same model with dense weights: what the 4-bit ones stand for."""
    with torch.device(model.device):
        twin = AutoModelForCausalLM.from_config(_without_quantization(model.config), dtype=model.dtype)
    twin.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, W4A16Linear):
                twin.get_submodule(name).weight.copy_(_dequantized(module.get()))
            elif isinstance(module, W4A16Experts):
                block = twin.get_submodule(name)
                block.gate_up_proj.copy_(_dequantized(module.w13.get()))
                block.down_proj.copy_(_dequantized(module.w2.get()))
    return twin.eval()


def _dequantized(packed: PackedWeight) -> Tensor:
    return unpack(packed).dequantize(packed.act)


class Prompted:
    """A generation by transformers' own forward and cache: random tokens in, the likeliest token at every step."""

    def __init__(self, model: Any, batch: int, prompt: int):
        self.model = model
        self.ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, prompt), device=model.device)
        self.last, self.cache = self.ids, None

    def prefill(self) -> None:
        self.cache = None
        self._step(self.ids)

    def decode(self) -> None:
        self._step(self.last)

    def _step(self, ids: Tensor) -> None:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.last = out.past_key_values, out.logits[:, -1:].argmax(-1)
