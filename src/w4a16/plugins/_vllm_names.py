"""Every name of vLLM that w4a16 uses and vLLM does not document, in one table. Seen in 0.32.0 and 0.33.0.

`missing` looks for them in the vLLM that is installed; tests/vllm/test_names.py also reads the files of the newest one.
"""

from __future__ import annotations

import importlib
import inspect
import re

SEEN = ("0.32.0", "0.33.0")
LAYERS = "vllm.model_executor.layers"
QUANTIZATION = f"{LAYERS}.quantization"

# module: names in it, "Class.name" for what a class holds; in brackets, arguments that w4a16 passes or is passed
NAMES: dict[str, tuple[str, ...]] = {
    "vllm.logger": ("init_logger",),
    "vllm.config": ("get_current_vllm_config",),
    "vllm.config.kernel": ("KernelConfig.enable_jit_warmup",),
    "vllm.config.scheduler": ("SchedulerConfig.max_num_batched_tokens",),
    "vllm.scalar_type": ("scalar_types",),
    "vllm.model_executor.models.utils": ("WeightsMapper",),
    "vllm.model_executor.parameter": ("BasevLLMParameter", "ChannelQuantScaleParameter", "ModelWeightParameter"),
    f"{LAYERS}.linear": (
        "LinearBase",
        "LinearMethodBase.create_weights(layer, input_size_per_partition, output_partition_sizes, input_size, "
        "output_size, params_dtype)",
        "LinearMethodBase.apply(layer, x, bias)",
        "register_weight_loader_v2_supported_method",
    ),
    f"{LAYERS}.vocab_parallel_embedding": ("ParallelLMHead",),
    f"{LAYERS}.fused_moe": ("FusedMoEMethodBase", "RoutedExperts"),
    f"{LAYERS}.fused_moe.routed_experts": ("RoutedExperts.expert_map", "RoutedExperts.load_weights"),
    f"{LAYERS}.fused_moe.expert_map_manager": ("ExpertMapManager.map_global_to_local",),
    f"{LAYERS}.fused_moe.config": (
        "FusedMoEConfig.experts_per_token",
        "FusedMoEConfig.has_bias",
        "FusedMoEConfig.is_act_and_mul",
        "FusedMoEConfig.is_lora_enabled",
        "FusedMoEConfig.num_local_experts",
        "FusedMoEConfig.tp_rank",
        "FusedMoEConfig.tp_shard_with_padding",
        "FusedMoEConfig.tp_size",
        "FusedMoEParallelConfig.use_ag_rs_all2all_kernels",
        "FusedMoEParallelConfig.use_all2all_kernels",
    ),
    f"{LAYERS}.fused_moe.fused_moe_method_base": (
        "FusedMoEMethodBase.apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)",
        "FusedMoEMethodBase.create_weights(layer, num_experts, hidden_size, intermediate_size_per_partition, "
        "params_dtype)",
        "FusedMoEMethodBase.get_fused_moe_quant_config(layer)",
    ),
    QUANTIZATION: ("register_quantization_config",),
    f"{QUANTIZATION}.base_config": (
        "QuantizationConfig.get_checkpoint_weight_mapper",
        "QuantizationConfig.override_quantization_method(hf_quant_cfg, user_quant, hf_config)",
        "QuantizeMethodBase.process_weights_after_loading(layer)",
    ),
    f"{QUANTIZATION}.auto_awq": ("AutoAWQConfig.from_config", "AutoAWQConfig.get_quant_method(layer, prefix)"),
    f"{QUANTIZATION}.auto_gptq": (
        "AutoGPTQConfig.TYPE_MAP",
        "AutoGPTQConfig.__init__(weight_bits, group_size, desc_act, is_sym, lm_head_quantized, dynamic, full_config, "
        "modules_in_block_to_quantize)",
        "AutoGPTQConfig.get_quant_method(layer, prefix)",
        "AutoGPTQLinearMethod",
        "get_moe_quant_method(config, layer, prefix, moe_method_cls)",
    ),
    f"{QUANTIZATION}.utils.gptq_utils": ("get_linear_quant_method(config, layer, prefix, linear_method_cls)",),
    f"{QUANTIZATION}.utils.quant_utils": ("is_layer_skipped(prefix, ignored_layers, fused_mapping, match_mode)",),
    f"{QUANTIZATION}.compressed_tensors.compressed_tensors": (
        "CompressedTensorsConfig._add_fused_moe_to_target_scheme_map",
        "CompressedTensorsConfig._is_wNa16_group_channel(weight_quant, input_quant)",
        "CompressedTensorsConfig.get_quant_method(layer, prefix)",
        "CompressedTensorsConfig.get_scheme_dict(layer, layer_name)",
    ),
}


def parse(entry: str) -> tuple[list[str], list[str]]:
    """An entry as the path within its module, and the arguments."""
    name, _, arguments = entry.rstrip(")").partition("(")
    return name.split("."), re.findall(r"\w+", arguments)


def _held(owner: object, name: str) -> object:
    """An attribute of a module or class, or the type of a field that a dataclass declares without a default."""
    fields: dict[str, object] = getattr(owner, "__annotations__", {}) if isinstance(owner, type) else {}
    return fields[name] if name in fields and not hasattr(owner, name) else getattr(owner, name)


def missing() -> list[str]:
    """The entries of the table that this vLLM does not have."""
    gone = []
    for module, entries in NAMES.items():
        for entry in entries:
            path, arguments = parse(entry)
            try:
                found: object = importlib.import_module(module)
                for part in path:
                    found = _held(found, part)
            except (ImportError, AttributeError):
                gone.append(f"{module}.{'.'.join(path)}")
                continue
            if arguments and not set(arguments) <= inspect.signature(found).parameters.keys():  # type: ignore[arg-type]
                gone.append(f"{module}.{entry}")
    return gone
