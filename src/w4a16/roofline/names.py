"""What a GPU kernel or an operator is, by its name alone."""

from __future__ import annotations

import functools
import pkgutil
import re
from dataclasses import dataclass

from .. import kernels

W4A16, GEMM, ATTENTION, COPY, OTHER = "W4A16", "dense GEMM", "attention", "copy", "other"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the five kinds above, and what the report calls it: a stem, a library's name."""

    kind: str
    op: str


# Other people's 4-bit kernels, first match wins: (pattern, name). Those that only dequantise count as W4A16 too.
_FOREIGN = (
    (r"marlin_moe|MarlinMoE", "marlin_moe"),
    (r"marlin_repack|awq_repack", ""),  # at load time, once
    (r"marlin", "marlin"),
    (r"machete", "machete"),
    (r"gem[mv]\w*_INT_\w*kernel", "gemlite"),
    (r"fused_moe_wvSplitK_int4", "fused_moe_wvsplitk_int4"),
    (r"wvSplitK_?int4", "wvSplitK_int4"),
    (r"_triton_w4a16_skinny_fmt_kernel", "triton_w4a16_skinny_fmt"),
    (r"moe_gemm_w4a16", "moe_gemm_w4a16"),
    (r"moe_wna16_gemm|fused_moe_kernel_gptq_awq", "moe_wna16"),
    (r"tinygemm|_weight_int4pack_mm", "tinygemm"),
    (r"gemm_half_q_half|reconstruct_exllama|exllama", "exllama"),
    (r"awq_gemm|gemm_forward_4bit|awq_dequantize|dequantize_weights", "awq"),
    (r"fpA_intB|weight_only", "fpA_intB"),
    (r"gemm_4bit|kDequantizeBlockwise", "bitsandbytes"),
    (r"_w4a16|w4a16_|wna16|int4_?gemm|gemm_?int4|b_scale.*pk_i4|pk_i4", "other W4A16"),
)

_GEMM = re.compile(
    r"gemm|nvjet|^Cijk_|xmma|gemv|splitKreduce|cublas|rocblas|wvSplitK|LLMM1|triton_tem_|^triton_mm|_scaled_mm|fused_moe",
    re.I,
)
_ATTENTION = re.compile(
    r"flash_?(fwd|bwd|attn|attention)|flash::|fmha|sdpa|attention|attn|paged_|(Batch|Single)(Prefill|Decode)With|_mla_",
    re.I,
)
_COPY = re.compile(r"^(Memcpy|Memset|Copy(HostTo|DeviceTo)|hipMem)", re.I)
_INDUCTOR = re.compile(r"triton_(poi|per|red|for|unk)_")  # torch.compile names these by all that is around them
ATTENTION_OP = re.compile(r"scaled_dot_product|flash_attn|_attention|attention_|paged_attn|flashinfer", re.I)


@functools.cache
def own_stems() -> tuple[str, ...]:
    """The stems of w4a16's GPU kernels, the longest first: each names its jit functions."""
    stems = (module.name for module in pkgutil.iter_modules(kernels.__path__))
    return tuple(sorted((s for s in stems if not s.startswith(("_", "cpu_", "dense"))), key=len, reverse=True))


@functools.lru_cache(maxsize=1 << 16)
def kind_of(name: str) -> Kind:
    """What the kernel of that name does."""
    for stem in own_stems():
        if re.fullmatch(rf"_?{stem}(_\w+)?", name):
            return Kind(kind=W4A16, op=stem)
    if _INDUCTOR.match(name):
        return Kind(kind=OTHER, op="other")
    for pattern, op in _FOREIGN:
        if re.search(pattern, name):
            return Kind(kind=W4A16, op=op) if op else Kind(kind=OTHER, op="repack")
    if _COPY.search(name):
        return Kind(kind=COPY, op="copy")
    if _ATTENTION.search(name):
        return Kind(kind=ATTENTION, op="attention")
    if _GEMM.search(name):
        return Kind(kind=GEMM, op="gemm")
    return Kind(kind=OTHER, op="other")


@functools.lru_cache(maxsize=1 << 16)
def short(name: str, width: int = 60) -> str:
    """A C++ kernel name without return type, template arguments and parameters."""
    out: list[str] = []
    depth = 0
    for char in name.removeprefix("void "):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0 and out and not "".join(out).endswith("::"):
            break
        if depth == 0 and char != ">":
            out.append(char)
    text = "".join(out).strip() or name
    return text if len(text) <= width else text[: width - 1] + "…"
