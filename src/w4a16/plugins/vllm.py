"""vLLM on w4a16's kernels: the entry point that vLLM calls in each of its processes (group `vllm.general_plugins`).

With the package installed beside vLLM nothing else is needed: 4-bit AWQ, GPTQ and compressed-tensors checkpoints, dense
and MoE, land on w4a16::linear and w4a16::moe. W4A16_VLLM=0 leaves vLLM as it is. docs/vllm.md says what goes where.
"""

from __future__ import annotations

import logging

from .. import env

logger = logging.getLogger("vllm.w4a16")  # a child of vLLM's logger, or its lines would not show
_registered = False


def register() -> None:
    """Puts w4a16's methods into vLLM's registry of quantisation configurations. Touches no device, may run again.

    An exception here would end vLLM; where this vLLM lacks a name that w4a16 needs, it says which and changes nothing.
    """
    global _registered
    if _registered or not env.VLLM:
        return
    _registered = True
    from ._vllm_names import SEEN, missing

    gone = missing()
    if gone:
        seen = " and ".join(SEEN)
        logger.warning("w4a16 is off: this vLLM has no %s; w4a16 was tested with vLLM %s.", ", ".join(gone), seen)
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ._vllm_configs import CONFIGS

    for name, config in CONFIGS.items():
        register_quantization_config(name)(config)
