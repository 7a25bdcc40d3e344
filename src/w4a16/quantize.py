"""Dense weights to 4 bits: round to nearest, with a clipping range searched per group. No calibration data.

The search follows the usual grid over shrunken ranges (as in OmniQuant's and AWQ's clipping): of CLIP_GRID ranges the
one with the least squared error of the dequantised group wins, measured with the scale as it will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import Checkpoint, Scheme, open_checkpoint, write_checkpoint
from .checkpoints.convert import dense_modules
from .errors import BadInput, Unsupported, explain_mismatch
from .weight import CODES_PER_WORD, SYMMETRIC_ZERO, QuantizedWeight, pack_nibbles

CLIP_GRID = tuple(1 - step / 40 for step in range(21))  # all of the range down to half; 0.875 uses code -8 at 8 steps
CHUNK = 1 << 20  # weights quantised at a time: a few MB of fp32, so that the search runs in cache
MIN_ROWS = 64  # a Linear with fewer rows (a router, a gate) holds too few weights to be worth its error


def quantize(weight: Tensor, *, group: int, symmetric: bool) -> QuantizedWeight:
    """A dense weight [..., N, K], floating point, as 4-bit codes in groups of `group` columns (-1: all K).

    The scales keep the weight's dtype. Raises BadInput when the group does not divide K or the weight is not finite.
    """
    if weight.ndim < 2 or not weight.is_floating_point():
        got, wanted = f"{list(weight.shape)} of {weight.dtype}", "[..., N, K], floating point"
        raise BadInput(explain_mismatch("weight", got=got, wanted=wanted, then="Pass a dense weight."))
    n, k = weight.shape[-2:]
    group = k if group == -1 else group
    if group < 1 or k % group or k % CODES_PER_WORD:
        wanted = f"a divisor of K={k}, with K a multiple of {CODES_PER_WORD}"
        raise BadInput(explain_mismatch("group size", got=group, wanted=wanted, then="Pick another --group-size."))
    if not torch.isfinite(weight).all():
        raise BadInput(
            explain_mismatch("weight", got="NaN or infinity", wanted="finite numbers", then="Check the model.")
        )
    rows = weight.reshape(-1, k)
    step = max(1, CHUNK // k)
    parts = [_quantize_rows(rows[i : i + step], group, symmetric) for i in range(0, rows.shape[0], step)]
    codes, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    lead = weight.shape[:-2]
    return QuantizedWeight(
        codes=codes.reshape(*lead, n, -1),
        scales=scales.reshape(*lead, n, -1),
        zeros=None if symmetric else zeros.reshape(*lead, n, -1),
        group=group,
    )


def _quantize_rows(weight: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[R, K] to int32 words [R, K//8], scales [R, K//group] and zeros uint8 of that shape."""
    w = weight.float().unflatten(-1, (-1, group))
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    least = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.full_like(low, SYMMETRIC_ZERO)
    for clip in CLIP_GRID:
        width = torch.maximum(high / 7, -low / 7) if symmetric else (high - low) / 15
        # the scale as it will be stored: in the weight's dtype, and never zero, even for a group of zeros
        scale = (width * clip).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny).float()
        zero = zeros if symmetric else (-low * clip / scale).round_().clamp_(0, 15)
        error = _codes(w, scale, zero).sub_(zero).mul_(scale).sub_(w).square_().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    codes = pack_nibbles(_codes(w, scales, zeros).flatten(-2))
    return codes, scales.squeeze(-1).to(weight.dtype), zeros.squeeze(-1).to(torch.uint8)


def _codes(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (w / scale).round_().add_(zero).clamp_(0, 15)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What quantising a model will do: weights to quantise by tensor name, and why the other Linear layers stay."""

    linear: tuple[str, ...]
    fused_experts: tuple[str, ...]
    left_dense: tuple[tuple[str, str], ...]


def plan(checkpoint: Checkpoint, *, group: int) -> Plan:
    """Finds the Linear weights and expert blocks of any Hugging Face causal LM by its structure, not by name."""
    modules = _linear_modules(checkpoint)
    linear, experts, left = [], [], []
    for name in checkpoint.dense:
        module = name.removesuffix(".weight")
        per_expert = ".experts." in name and name.endswith(".weight")
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            experts.append(name)
        elif (module in modules or per_expert) and name.endswith(".weight"):
            why = _left_dense(checkpoint.shape(name), group)
            if why:
                left.append((module, why))
            else:
                linear.append(name)
    left += [(name, "output embedding") for name in sorted(modules.get("", ()))]
    return Plan(linear=tuple(linear), fused_experts=tuple(experts), left_dense=tuple(left))


def _left_dense(shape: tuple[int, ...], group: int) -> str | None:
    n, k = shape
    if n < MIN_ROWS or n % CODES_PER_WORD:
        return f"{n} rows: fewer than {MIN_ROWS} or not a multiple of {CODES_PER_WORD}"
    if k % CODES_PER_WORD or (group != -1 and k % group):
        return f"K={k} is not a multiple of the group {group}"
    return None


def _linear_modules(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Names of the nn.Linear modules of the model, the output embedding apart (under the key "")."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    named = (config.architectures or [None])[0]
    cls = getattr(transformers, named, None) if named else None
    with torch.device("meta"):
        model = cls(config) if cls is not None else transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if module is head:
                found[""] = (name,)
            else:
                found[name] = ()
    return found


def quantize_model(
    source: str | Path,
    out: str | Path,
    *,
    group: int = 128,
    symmetric: bool = True,
    format: str = "compressed-tensors",
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """Reads a dense checkpoint tensor by tensor, quantises its Linear layers and experts, writes `out` in `format`.

    progress is called as (done, total, name). Raises Unsupported when `source` is quantised already.
    """
    with open_checkpoint(source) as checkpoint:
        if checkpoint.format is not None:
            raise Unsupported(f"{source} is quantised already ({checkpoint.format}). Use `w4a16 convert`.")
        work = plan(checkpoint, group=group)
        if not work.linear and not work.fused_experts:
            raise Unsupported(f"{source} has no Linear weight that a group of {group} divides. Use --group-size 32.")
        scheme = Scheme(group=group, symmetric=symmetric)
        write_checkpoint(
            Path(out),
            format=format,
            config=checkpoint.config,
            scheme=scheme,
            items=_items(checkpoint, work, scheme, progress),
            ignore=list(dict.fromkeys([*dense_modules(checkpoint, set(work.linear)), *dict(work.left_dense)])),
            extra_files_from=checkpoint.path,
        )
    return work


def _items(
    checkpoint: Checkpoint, work: Plan, scheme: Scheme, progress: Callable[[int, int, str], None] | None
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    options: dict[str, Any] = {"group": scheme.group, "symmetric": scheme.symmetric}
    linear, fused = set(work.linear), set(work.fused_experts)
    for done, name in enumerate(checkpoint.dense):
        if progress is not None:
            progress(done, len(checkpoint.dense), name)
        tensor = checkpoint.tensor(name)
        if name in linear:
            yield name.removesuffix(".weight"), quantize(tensor, **options)
        elif name in fused:
            yield from _per_expert(name, tensor, options)
        else:
            yield name, tensor


def _per_expert(name: str, stacked: Tensor, options: dict[str, Any]) -> Iterator[tuple[str, QuantizedWeight]]:
    """A fused expert tensor [E, N, K] as the per-expert modules that quantised checkpoints hold."""
    prefix, _, kind = name.rpartition(".")
    for expert, weight in enumerate(stacked):
        if kind == "down_proj":
            yield f"{prefix}.{expert}.down_proj", quantize(weight, **options)
        else:
            gate, up = weight.chunk(2)
            yield f"{prefix}.{expert}.gate_proj", quantize(gate, **options)
            yield f"{prefix}.{expert}.up_proj", quantize(up, **options)
