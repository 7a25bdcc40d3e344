"""Where each quantised module of a checkpoint belongs in a transformers model, found with transformers' own renames."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..checkpoints import Checkpoint
from ..checkpoints.shards import DTYPES, Entry
from ..errors import BadCheckpoint, Unsupported
from ._names import private

SHOWN = 6  # names that a message lists
LARGE_BYTES = 1 << 24  # of a dense parameter that is worth reading ourselves
SPELLINGS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


@dataclass(kw_only=True)
class ExpertNames:
    """One expert block: names on disk by (projection, expert), and the sizes that the model gives it."""

    experts: int
    hidden: int
    intermediate: int
    names: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """On disk, what comes before the number of the expert."""
        return self.names["down", 0].rsplit(".", 2)[0]


@dataclass(kw_only=True)
class Places:
    """linears  name in the model to name on disk
    experts  block in the model to its names on disk
    renamed  names of all quantised modules as transformers' loader sees them, after its renames
    biased   those of `renamed` whose bias is a parameter of the model
    dense    names on disk of the modules that stay dense and may be Linear, as a router is to some engines
    large    parameters of LARGE_BYTES and more that the model keeps as they are stored: in the model to on disk
    """

    linears: dict[str, str] = field(default_factory=dict)
    experts: dict[str, ExpertNames] = field(default_factory=dict)
    renamed: set[str] = field(default_factory=set)
    biased: set[str] = field(default_factory=set)
    dense: list[str] = field(default_factory=list)
    large: dict[str, str] = field(default_factory=dict)


def some(names: Iterable[str]) -> str:
    """The first few of `names`, for a message."""
    listed = sorted(set(names))
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def find_places(model: Any, checkpoint: Checkpoint) -> Places:
    """Raises BadCheckpoint when a quantised module has no place in the model, or an expert block is incomplete."""
    api = private()
    mapping = api.get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, api.WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, api.WeightConverter)]
    by_source = {source: converter for converter in converters for source in converter.source_patterns}
    ignored = re.compile("|".join(f"({p})" for p in model._keys_to_ignore_on_load_unexpected or ()) or "(?!)")
    state, prefix = model.state_dict(), model.base_model_prefix
    modules = {f"{module}.weight": module for module in checkpoint.quantized}
    places, homeless, stray = Places(), [], []
    # in the order in which transformers renames, as some renames depend on the names that came before
    for key in sorted([*checkpoint.dense, *modules], key=api.dot_natural_key):
        name, source = api.rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, source = key, None
        if key not in modules:
            if name not in state:
                stray.append(key)
            elif source is None and key.endswith(".weight") and state[name].ndim == 2:
                places.dense.append(key.removesuffix(".weight"))
                kept = _kept(model, name, state[name], checkpoint.entries(key)[""])
                if kept and api.rename_source_key(key, renamings, [])[0] == name:
                    places.large[name] = key
            continue
        renamed = api.rename_source_key(key, renamings, [])[0].removesuffix(".weight")
        places.renamed.add(renamed)
        if name not in state:
            homeless += [] if ignored.search(name) else [modules[key]]
        elif source is None:
            owner = _want_linear(checkpoint, modules[key], name, _owner(model, name))
            places.linears[name.removesuffix(".weight")] = modules[key]
            places.biased |= {renamed} if owner.bias is not None else set()
        else:
            _add_expert(places, model, modules[key], name, renamed, by_source[source], source)
    if homeless:
        raise BadCheckpoint(
            f"{checkpoint.path}: got quantised modules for which {type(model).__name__} has no place: "
            f"{some(homeless)}. Load the checkpoint with the class that its config.json names."
        )
    for block, found in places.experts.items():
        _want_all(checkpoint, block, found)
    placed = {*places.linears.values(), *(name for found in places.experts.values() for name in found.names.values())}
    for key in stray:
        if key.removesuffix(".bias") in placed:
            _want_zeros(checkpoint, key)
    return places


def _kept(model: Any, name: str, parameter: Tensor, stored: Entry) -> bool:
    """Whether a parameter is large and has the bytes that are stored: no cast, no other name for them, no shard."""
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return False
    same = DTYPES[stored.dtype] == parameter.dtype and stored.shape == parameter.shape
    return same and stored.nbytes >= LARGE_BYTES and name not in model.all_tied_weights_keys


def _owner(model: Any, parameter: str) -> nn.Module:
    owner: nn.Module = model.get_submodule(parameter.rpartition(".")[0])
    return owner


def _want_linear(checkpoint: Checkpoint, module: str, name: str, owner: nn.Module) -> nn.Linear:
    if type(owner) is not nn.Linear or not name.endswith(".weight"):
        raise Unsupported(
            f"{module} is quantised, but its place in the model, {name}, is in a {type(owner).__name__}; w4a16 serves "
            "nn.Linear and expert blocks. Quantise the model again and leave this module dense."
        )
    _want_size(checkpoint, module, owner.out_features, owner.in_features)
    return owner


def _want_size(checkpoint: Checkpoint, module: str, n: int, k: int) -> None:
    plan = checkpoint.plan(module)
    if (plan.n, plan.k) != (n, k):
        raise BadCheckpoint(
            f"{checkpoint.path}: {module}: got [{plan.n}, {plan.k}], wanted [{n}, {k}] as config.json says. "
            "Download or write the checkpoint again."
        )


def _want_zeros(checkpoint: Checkpoint, bias: str) -> None:
    """Early GPTQ files hold a bias of zeros for every layer; any other one may not be dropped."""
    if checkpoint.tensor(bias).any():
        raise BadCheckpoint(f"{checkpoint.path}: {bias}: got a bias, wanted none: the model's layer adds none.")


def _add_expert(places: Places, model: Any, module: str, name: str, renamed: str, converter: Any, source: str) -> None:
    """Notes `module` as one expert's projection of the block that holds the parameter `name`."""
    block, _, parameter = name.rpartition(".")
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    fused = [("MergeModulelist", 0), ("Concatenate", 1)]
    projections = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(parameter, ())
    expert = re.search(source.replace("*.", r"(?P<expert>\d+)\."), f"{renamed}.weight")
    known = len(converter.source_patterns) == len(projections) and steps == fused[: len(projections)]
    projection = projections[converter.source_patterns.index(source)] if known else ""
    if expert is None or module.rpartition(".")[2] not in SPELLINGS.get(projection, ()):
        raise Unsupported(
            f"{module} is quantised, but the model joins it into {name} in a way that w4a16 does not know ({steps}). "
            "Quantise the model again and leave this module dense."
        )
    if block not in places.experts:
        down = getattr(_owner(model, name), "down_proj", None)
        if down is None or down.ndim != 3:
            raise Unsupported(f"{block}: got no down_proj [E, H, I], wanted one. Leave these experts dense.")
        sizes = dict(zip(("experts", "hidden", "intermediate"), down.shape, strict=True))
        places.experts[block] = ExpertNames(**sizes)
    places.experts[block].names[projection, int(expert["expert"])] = module


def _want_all(checkpoint: Checkpoint, block: str, found: ExpertNames) -> None:
    """Raises unless every projection of every expert is there, and is of the size that the model gives it."""
    wanted = {(projection, expert) for projection in SPELLINGS for expert in range(found.experts)}
    lost = [f"{block}.{expert} {projection}" for projection, expert in wanted - found.names.keys()]
    extra = [found.names[place] for place in found.names.keys() - wanted]
    if lost or extra:
        raise BadCheckpoint(
            f"{checkpoint.path}: got {len(found.names)} quantised expert projections for {block}, wanted {len(wanted)} "
            f"({found.experts} experts): {'missing' if lost else 'too many'} {some(lost or extra)}. "
            "Download or write the checkpoint again."
        )
    inner, outer = (found.intermediate, found.hidden), (found.hidden, found.intermediate)
    for (projection, _), module in found.names.items():
        _want_size(checkpoint, module, *(outer if projection == "down" else inner))
    if found.prefix not in checkpoint.expert_prefixes:
        raise Unsupported(f"{checkpoint.path}: {found.prefix}: got names of experts that w4a16 does not know.")
