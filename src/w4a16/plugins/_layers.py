"""Puts W4A16Linear and W4A16Experts into a transformers model, then fills them from a checkpoint, one at a time."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..api import pack_all, pack_experts
from ..checkpoints import FORMATS, Checkpoint, Scheme
from ..checkpoints.base import CHANNEL
from ..checkpoints.stream import Stream
from ..device import within_memory
from ..errors import BadCheckpoint, Unsupported
from ..layouts import unpack
from ..nn import W4A16Experts, W4A16Linear
from ..reference import ACTIVATIONS
from ..weight import QuantizedWeight
from ._names import private
from ._places import Places, some
from ._tp import Shards

SKIPPED = "w4a16::quantised"  # the name under which transformers meets every tensor that it shall leave to us
CALL = ["self", "hidden_states", "top_k_index", "top_k_weights"]


def swap(model: Any, places: Places, dtype: torch.dtype) -> None:
    """Replaces the modules of `places` by empty ones of ours; a bias stays a parameter that transformers fills."""
    for name in places.linears:
        dense = model.get_submodule(name)
        bias = dense.bias is not None
        model.set_submodule(name, W4A16Linear(dense.in_features, dense.out_features, bias=bias, dtype=dtype))
        model.all_tied_weights_keys.pop(f"{name}.weight", None)  # stored quantised, so not tied
    for name, found in places.experts.items():
        activation = _activation(name, model.get_submodule(name))
        model.set_submodule(name, W4A16Experts(found.experts, activation=activation))


def _activation(name: str, block: nn.Module) -> str:
    """The name in ACTIVATIONS of what the block computes; raises Unsupported when it is not act(gate) * up."""
    odd = [n for n, _ in block.named_parameters() if n not in ("gate_up_proj", "down_proj")]
    odd += [flag for flag in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(block, flag, False)]
    odd += [f"no {flag}" for flag in ("is_concatenated", "has_gate") if not getattr(block, flag, True)]
    if list(inspect.signature(type(block).forward).parameters) != CALL:
        odd += ["another signature of forward"]
    if odd:
        raise _odd_experts(name, block, " and ".join(odd))
    # far enough out to see a clamp; on the CPU, as transformers builds models on the meta device
    gate = torch.linspace(-20, 20, 64, dtype=torch.float32, device="cpu")
    up = gate.flip(0) + 0.5
    gated: Callable[[Tensor], Tensor] | None = getattr(block, "_apply_gate", None)
    got = gated(torch.cat([gate, up])[None])[0] if gated else block.act_fn(gate) * up  # type: ignore[operator]
    for activation, function in ACTIVATIONS.items():
        if torch.allclose(got, function(gate) * up, rtol=1e-5, atol=1e-5):
            return activation
    raise _odd_experts(name, block, "an activation that is none of " + ", ".join(ACTIVATIONS))


def _odd_experts(name: str, block: nn.Module, what: str) -> Unsupported:
    return Unsupported(
        f"{name} ({type(block).__name__}) has {what}; w4a16 serves experts that compute down(act(gate) * up). "
        "Leave these experts dense when you quantise the model."
    )


def skip_quantized(places: Places) -> Any:
    """A rename for transformers' loader that turns every tensor of our modules into SKIPPED, so that it reads none."""
    renaming: Any = private().WeightRenaming

    class Skip(renaming):  # type: ignore[misc]
        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            module, _, tensor = source_key.rpartition(".")
            ours = module in places.renamed and not (tensor == "bias" and module in places.biased)
            ours = ours or source_key in places.large
            return (SKIPPED if ours else source_key), None

    return Skip(SKIPPED, SKIPPED)


def raise_if_missing(model: Any, places: Places, where: object) -> None:
    """Makes transformers' loader raise BadCheckpoint where it would initialise a parameter at random.

    Those of `places.large` it has to believe missing, and initialises, before `fill` gives them their values.
    """
    adjust = model._adjust_missing_and_unexpected_keys
    # before 5.23 transformers compares no shape in a quantised model
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def check(info: Any) -> None:
        del model._adjust_missing_and_unexpected_keys  # this function, which hides the method
        info.missing_keys -= places.large.keys()
        adjust(info)
        info.unexpected_keys = {key for key in info.unexpected_keys if SKIPPED not in key}
        found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found |= {name: tuple(shape) for name, shape, _ in info.mismatched_keys}
        shapes = [f"{name} {found[name]}, wanted {shape}" for name, shape in wanted.items() if found[name] != shape]
        lost = [*info.missing_keys, *shapes, *info.conversion_errors]
        if lost:
            # or transformers raises its own error over ours
            info.missing_keys, info.mismatched_keys, info.conversion_errors = set(), set(), {}
            raise BadCheckpoint(
                f"{where}: {len(lost)} parameters of {type(model).__name__} did not load: {some(lost)}. "
                "Download or write the checkpoint again, or load it with the class that its config.json names."
            )

    model._adjust_missing_and_unexpected_keys = check


def read(checkpoint: Checkpoint, places: Places, device_of: Callable[[str], torch.device]) -> Stream:
    """What `fill` asks for, in its order."""
    items = [(stored, device_of(name)) for name, stored in (*places.large.items(), *places.linears.items())]
    for name, found in places.experts.items():
        items += [(module, device_of(name)) for module in checkpoint.expert_modules(found.prefix)]
    return Stream(checkpoint, items)


def warm(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Packs the smallest weight, two as one, and drops them: CUDA loads each kernel when it first runs, 0.1 s in all.

    For a thread beside transformers' part of a load. What is wrong with the weight will be said when it is loaded.
    """
    with suppress(Exception):
        smallest = min(checkpoint.quantized, key=lambda name: checkpoint.plan(name).n * checkpoint.plan(name).k)
        with Stream(checkpoint, [(smallest, device)], readers=1) as stream:
            pack_all([stream.weight(smallest)] * 2, device=device, act=dtype)


def fill(
    model: Any, checkpoint: Checkpoint, places: Places, dtype: torch.dtype, shards: Shards, stream: Stream
) -> None:
    """Takes one module after another, cuts it, packs it where the model's device map wants it, while the next are read.

    Raises OverBudget when memory runs out, with the name of the module.
    """
    names = [*places.linears, *places.experts]
    with stream:
        for name, stored in places.large.items():
            with within_memory(name, device_of(model, name)):
                model.get_parameter(name).data = stream.tensor(stored)  # in place: it may be tied
        read: list[QuantizedWeight] = []
        for at, name in enumerate(tqdm(names, desc="Packing weights")):
            module, device = model.get_submodule(name), device_of(model, name)
            with within_memory(f"{name}, weight {at + 1} of {len(names)}", device):
                if name in places.linears:
                    read.append(shards.linear(name, stream.weight(places.linears[name])))
                    if not stream.more or at + 1 == len(places.linears):
                        packed = pack_all(read, device=device, act=dtype)
                        for owner, weight in zip(names[at + 1 - len(read) : at + 1], packed, strict=True):
                            model.get_submodule(owner).set(weight)
                        read.clear()
                else:
                    w13, w2 = shards.experts(name, *checkpoint.experts(places.experts[name].prefix, stream))
                    module.set(*pack_experts(w13, w2, device=device, act=dtype))


def device_of(model: Any, name: str) -> torch.device:
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    held = [prefix for prefix in places if not prefix or name == prefix or name.startswith(f"{prefix}.")]
    return torch.device(places[max(held, key=len)]) if held else torch.device(model.device)


def packed_state(model: Any, places: Places) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict to save and its `quantization_config`: compressed-tensors, or GPTQ where it needs act-order."""
    ours = (*places.linears, *(f"{name}.{half}" for name in places.experts for half in ("w13", "w2")))
    packed = {f"{name}.{tensor}" for name in ours for tensor in ("codes", "scales", "zeros", "perm")}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    weights = list(_weights(model, places))
    writer = FORMATS["gptq" if any(weight.perm is not None for _, weight in weights) else "compressed-tensors"]
    found: defaultdict[Scheme, list[str]] = defaultdict(list)
    for name, weight in weights:
        group = CHANNEL if weight.group == weight.k else weight.group
        found[Scheme(group, not weight.has_zeros, weight.perm is not None)].append(name)
    scheme = max(found, key=lambda each: len(found[each]))
    for name, weight in weights:
        state |= {f"{name}.{suffix}": tensor for suffix, tensor in writer.write(weight, scheme).items()}
    return state, writer.describe(scheme, found, places.dense)


def _weights(model: Any, places: Places) -> Iterator[tuple[str, QuantizedWeight]]:
    for name in places.linears:
        yield name, unpack(model.get_submodule(name).get().to("cpu"))
    for name, found in places.experts.items():
        block, half = model.get_submodule(name), found.intermediate
        upper, lower = unpack(block.w13.get().to("cpu")), unpack(block.w2.get().to("cpu"))
        rows = {"gate": slice(half), "up": slice(half, None), "down": slice(None)}
        for (projection, expert), disk in found.names.items():
            stack, span = lower if projection == "down" else upper, rows[projection]
            one = QuantizedWeight(
                codes=stack.codes[expert, span],
                scales=stack.scales[expert, span],
                zeros=None if stack.zeros is None else stack.zeros[expert, span],
                group=stack.group,
                perm=None if stack.perm is None else stack.perm[expert],
            )
            yield f"{name}.{expert}.{disk.rpartition('.')[2]}", one
