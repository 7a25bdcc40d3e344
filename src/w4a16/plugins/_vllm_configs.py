"""vLLM's quantisation configurations, each with one change: a 4-bit layer gets w4a16's method.

Subclasses of vLLM's own, registered under the same names, so that what they read from a checkpoint, which layers they
leave dense and how they treat a quantised KV cache stays vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import (
    AutoGPTQConfig,
    AutoGPTQLinearMethod,
    get_moe_quant_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.scalar_type import scalar_types

from .. import __version__
from ..checkpoints import Scheme
from ..checkpoints.awq import Awq
from ..checkpoints.base import CHANNEL, Fields
from ..checkpoints.gptq import Gptq
from ..errors import W4A16Error
from ..ops import linear_op
from ..problem import ACT_DTYPES
from ._vllm_formats import Stored, awq, compressed_tensors, gptq
from ._vllm_linear import W4A16LinearMethod, refuse, say_once
from ._vllm_moe import W4A16MoEMethod, moe_refusal

WHERE = "quantization_config"
PACKED = "pack-quantized"


def _experts(layer: Any, prefix: str, stored: Stored, scheme: Scheme, stock: Callable[[], Any] | None) -> Any:
    why = moe_refusal(layer, scheme)
    if why is None:
        return W4A16MoEMethod(stored, scheme, layer.moe_config)
    if stock is None:
        raise refuse(why, prefix)
    say_once(why, prefix)
    return stock()


class _Keyed:
    """vLLM keeps compiled graphs on disk, by the model's configuration: a graph of w4a16's calls must have another key.

    Else W4A16_VLLM=0 would run the graph that was compiled with the plugin on, and the other way round.
    """

    method: ClassVar[str]

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> Any:
        """vLLM asks every configuration whether it takes a checkpoint; what is set on hf_config enters the key."""
        if hf_config is not None and hf_quant_cfg.get("quant_method") == cls.method:
            hf_config.w4a16 = f"{__version__} {linear_op._schema}"
        return super().override_quantization_method(hf_quant_cfg, user_quant, hf_config=hf_config)  # type: ignore[misc]


class W4A16CompressedTensorsConfig(_Keyed, CompressedTensorsConfig):  # type: ignore[misc]
    method = "compressed-tensors"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        def stock() -> Any:
            return CompressedTensorsConfig.get_quant_method(self, layer, prefix)

        experts = isinstance(layer, RoutedExperts)
        if not experts and not isinstance(layer, (LinearBase, ParallelLMHead)):
            return stock()
        found = self._expert_settings(layer, prefix) if experts else self._settings(layer, prefix)
        why = "" if found is None else self._not_ours(found)
        if found is None or why:
            if why:
                say_once(why, prefix)
            return stock()
        weights = found["weights"]
        group = CHANNEL if weights.group_size is None else weights.group_size
        stored, scheme = compressed_tensors(symmetric=weights.symmetric), Scheme(group, weights.symmetric)
        if experts:
            return _experts(layer, prefix, stored, scheme, stock)
        return W4A16LinearMethod(stored, scheme, prefix, stock)

    def _settings(self, layer: nn.Module, name: str) -> Any:
        """The settings of one layer; None for a dense one."""
        try:
            return self.get_scheme_dict(layer, name)
        except ValueError:
            if isinstance(layer, ParallelLMHead):
                return None  # no target names the output embedding: it is dense
            raise

    def _expert_settings(self, layer: Any, prefix: str) -> Any:
        """The settings of an expert layer; None when it is dense, or its projections differ and vLLM shall say so."""
        self._add_fused_moe_to_target_scheme_map()
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        first, *others = [self._settings(layer, f"{prefix}.0.{name}") for name in names if name is not None]
        return first if all(other == first for other in others) else None

    def _not_ours(self, found: Mapping[str, Any]) -> str:
        """Why a quantised layer is not 4-bit weights under 16-bit activations; empty when it is."""
        weights = found["weights"]
        if weights is None or not self._is_wNa16_group_channel(weights, found.get("input_activations")):
            return "its activations are quantised, or its weights are neither by group nor by channel"
        if weights.num_bits != 4 or str(getattr(weights.type, "value", weights.type)) != "int":
            return f"its weights are {weights.type} of {weights.num_bits} bits, not integers of 4"
        if found.get("format") != PACKED:
            return f"its format is {found.get('format')}, not {PACKED}"
        if found.get("output_activations") is not None or self.transform_config is not None:
            return "its outputs are quantised or its weights transformed"
        return ""


class W4A16AwqConfig(_Keyed, AutoAWQConfig):  # type: ignore[misc]
    method = "awq"
    reader: Awq

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        try:
            reader = Awq(Fields(config, WHERE))
        except W4A16Error as error:
            say_once(str(error), "the model")
            return AutoAWQConfig.from_config(config)
        made = super().from_config(config)
        made.reader = reader
        return made

    @classmethod
    def get_supported_act_dtypes(cls) -> list[Any]:
        return list(ACT_DTYPES.values())

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        def stock() -> Any:
            return AutoAWQConfig.get_quant_method(self, layer, prefix)

        experts = isinstance(layer, RoutedExperts)
        head = isinstance(layer, ParallelLMHead) and self.lm_head_quantized
        if not experts and not head and not isinstance(layer, LinearBase):
            return stock()
        fused = {} if experts else self.packed_modules_mapping
        if is_layer_skipped(prefix, self.modules_to_not_convert, fused, match_mode="substring"):
            return stock()
        stored, scheme = awq(stores_zeros=self.reader.stores_zeros), self.reader.scheme
        if experts:
            return _experts(layer, prefix, stored, scheme, stock)
        return W4A16LinearMethod(stored, scheme, prefix, stock)


class W4A16GptqConfig(_Keyed, AutoGPTQConfig):  # type: ignore[misc]
    """Also takes sym=False and desc_act=True, which vLLM refuses."""

    method = "gptq"
    TYPE_MAP: ClassVar[dict[Any, Any]] = {**AutoGPTQConfig.TYPE_MAP, (4, False): scalar_types.uint4}

    def __init__(
        self,
        weight_bits: int,
        group_size: int,
        desc_act: bool,
        is_sym: bool,
        lm_head_quantized: bool,
        dynamic: dict[str, Any],
        full_config: dict[str, Any],
        modules_in_block_to_quantize: list[str] | None = None,
    ) -> None:
        # vLLM raises at act-order; it is told that there is none
        in_order = {rule: {k: v for k, v in (to or {}).items() if k != "desc_act"} for rule, to in dynamic.items()}
        settings = (is_sym, lm_head_quantized, in_order, full_config, modules_in_block_to_quantize)
        super().__init__(weight_bits, group_size, False, *settings)
        self.desc_act, self.dynamic = desc_act and group_size != CHANNEL, dynamic
        self.version = 1 if Gptq(Fields(full_config, WHERE)).offset else 2

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        try:
            Gptq(Fields(config, WHERE))
        except W4A16Error as error:
            say_once(str(error), "the model")
            return AutoGPTQConfig.from_config(config)
        return super().from_config(config)

    @classmethod
    def get_supported_act_dtypes(cls) -> list[Any]:
        return list(ACT_DTYPES.values())

    def get_checkpoint_weight_mapper(self) -> Any:
        """vLLM drops `g_idx`; here it is read where a layer may be in act-order."""
        return WeightsMapper() if self._reads_order() else AutoGPTQConfig.get_checkpoint_weight_mapper()

    def _reads_order(self) -> bool:
        return self.desc_act or any((values or {}).get("desc_act") for values in self.dynamic.values())

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return get_moe_quant_method(self, layer, prefix, lambda config, _: self._experts(config, layer, prefix))
        return get_linear_quant_method(self, layer, prefix, lambda config: self._linear(config, prefix))

    def _linear(self, config: Any, prefix: str) -> Any:
        """`config` is this one after the rules of `dynamic` for the layer."""
        if config.weight_bits != 4:
            say_once(f"its weights have {config.weight_bits} bits, not 4", prefix)
            return AutoGPTQLinearMethod(config)
        stock = (lambda: AutoGPTQLinearMethod(config)) if _vllm_takes(config) else None
        return W4A16LinearMethod(*self._stored(config), prefix, stock)

    def _experts(self, config: Any, layer: Any, prefix: str) -> Any:
        def stock() -> Any:
            return AutoGPTQConfig.get_quant_method(self, layer, prefix)

        if config.weight_bits != 4:
            say_once(f"its weights have {config.weight_bits} bits, not 4", prefix)
            return stock()
        return _experts(layer, prefix, *self._stored(config), stock if _vllm_takes(config) else None)

    def _stored(self, config: Any) -> tuple[Stored, Scheme]:
        stored = gptq(version=self.version, act_order=config.desc_act, reads_order=self._reads_order())
        return stored, Scheme(config.group_size, config.is_sym, config.desc_act)


def _vllm_takes(config: Any) -> bool:
    return config.is_sym and not config.desc_act


CONFIGS = {
    "compressed-tensors": W4A16CompressedTensorsConfig,
    **dict.fromkeys(("awq", "awq_marlin", "auto_awq"), W4A16AwqConfig),
    **dict.fromkeys(("gptq", "gptq_marlin", "auto_gptq"), W4A16GptqConfig),
}
