"""transformers' tensor parallelism, `DistributedConfig(tp_size=...)`: which part of each weight a rank holds.

transformers hooks the layers (it sums or gathers what they return) and shards the parameters it loads, biases among
them; packed weights are cut here, before they are packed, by the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import Unsupported
from ..nn import W4A16Linear
from ..weight import QuantizedWeight
from ._places import Places

COLUMN = ("colwise", "colwise_rep", "colwise_gather_output")
ROW = ("rowwise", "rowwise_rep", "rowwise_split_input")
EXPERTS = "moe_tp_experts"
OTHERS = ("pp_size", "fsdp_size", "dp_replicate_size", "ep_size")


@dataclass(frozen=True, kw_only=True)
class Shards:
    """One rank's part of every weight. `plan` is a style of transformers for each module that is cut."""

    plan: dict[str, str] = field(default_factory=dict)
    rank: int = 0
    world: int = 1

    def linear(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        style = self.plan.get(name)
        if style is None:
            return weight
        if style not in COLUMN + ROW:
            raise Unsupported(
                f"{name}: got the tensor-parallel style {style}, wanted one of {', '.join(COLUMN + ROW)}. "
                "Override it in DistributedConfig(tp_plan=...)."
            )
        return self._cut(name, weight, dim=0 if style in COLUMN else 1)

    def experts(self, name: str, w13: QuantizedWeight, w2: QuantizedWeight) -> tuple[QuantizedWeight, QuantizedWeight]:
        style = self.plan.get(name)
        if style is None:
            return w13, w2
        if style != EXPERTS:
            raise Unsupported(
                f"{name}: got the tensor-parallel style {style}, wanted {EXPERTS}. "
                "Override it in DistributedConfig(tp_plan=...)."
            )
        return self._cut(name, w13, dim=0, parts=2), self._cut(name, w2, dim=1)

    def _cut(self, name: str, weight: QuantizedWeight, *, dim: int, parts: int = 1) -> QuantizedWeight:
        try:
            return weight.shard(dim, self.rank, self.world, parts=parts)
        except Unsupported as error:
            raise Unsupported(f"{name}: {error}") from None


def prepare(model: Any, places: Places) -> None:
    """Tells transformers that our layers multiply plain tensors. Raises Unsupported at any other parallelism."""
    wanted = getattr(model.config, "distributed_config", None)
    if wanted is None:
        return
    if not hasattr(model, "_resolve_parallel_plans"):
        raise Unsupported("tensor parallelism needs transformers 5.23: pip install 'transformers>=5.23'.")
    odd = [f"{name}={size}" for name in OTHERS if (size := getattr(wanted, name, None) or 1) != 1]
    if odd:
        raise Unsupported(f"distributed_config: got {', '.join(odd)}, wanted tp_size alone. Use the vLLM plugin.")
    for name in places.linears:
        layer = model.get_submodule(name)
        assert isinstance(layer, W4A16Linear)
        layer._hf_quantized_needs_local_tp = True  # type: ignore[assignment]  # what transformers' own quantisers set


def drop_expert_tensors(plan: dict[str, str], places: Places) -> None:
    """Takes the rules for expert tensors out of a plan: those tensors are no parameters here."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    for name in places.experts:
        for tensor in ("gate_up_proj", "down_proj"):
            plan.pop(f"{replace_layer_number_by_wildcard(name)}.{tensor}", None)


def shards_of(model: Any) -> Shards:
    """This rank's part of a model that transformers has distributed; all of it when it has not."""
    meshes = getattr(model, "_mesh_manager", None)
    wanted = getattr(model.config, "distributed_config", None)
    if meshes is None or wanted is None or wanted.tp_size == 1:
        return Shards()
    mesh = meshes.get_mesh("tp")
    plan, _, _ = model._resolve_parallel_plans(wanted)
    return Shards(plan=dict(plan), rank=mesh.get_local_rank(), world=mesh.size())
