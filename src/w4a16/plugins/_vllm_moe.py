"""vLLM's routed experts on w4a16::moe: any routing, expert maps, tensor-parallel shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from ..api import experts_layout, moe, pack
from ..checkpoints import Scheme
from ..device import Device, current_device
from ..dispatch import choose
from ..errors import Unsupported
from ..moe.activations import ACTIVATIONS
from ..nn import W4A16Experts
from ..problem import ACT_NAMES, Problem
from . import _vllm_warmup
from ._vllm_formats import Convert, Cut, Stored, experts_of, in_order, refusal
from ._vllm_linear import logger, say_served

HALVES = {"w1": 0, "w3": 1}  # vLLM's names: gate is w1, up is w3, down is w2
NO_GATE = "_no_mul"
PREFILL_ROWS = 2048


def cuts(config: Any) -> tuple[Cut, Cut]:
    """This rank's part of gate above up, and of down."""
    hidden, inter, world = config.hidden_dim, config.intermediate_size_per_partition, config.tp_size
    gated = 2 if config.is_act_and_mul else 1
    return Cut(n=gated * inter, k=hidden, whole_k=hidden), Cut(n=hidden, k=inter, whole_k=inter * world)


def moe_refusal(layer: Any, scheme: Scheme) -> str | None:
    """Why w4a16 does not serve this expert layer, in one sentence; None when it does."""
    config = layer.moe_config
    activation = config.activation.value.removesuffix(NO_GATE)
    if activation not in ACTIVATIONS:
        return f"its experts compute {config.activation.value}, and w4a16 knows {', '.join(ACTIVATIONS)}"
    if config.has_bias:
        return "its experts have biases"
    if any(getattr(layer, name, None) is not None for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")):
        return "its experts clamp or scale inside their activation"
    if config.is_lora_enabled:
        return "LoRA on experts needs a kernel of vLLM's own"
    if config.tp_shard_with_padding:
        return "its shards are padded"
    ranks = config.moe_parallel_config
    if ranks.use_all2all_kernels and not ranks.use_ag_rs_all2all_kernels:
        return f"its tokens travel by {ranks.all2all_backend}, and w4a16 takes them by allgather_reducescatter"
    device = torch.empty(0).device
    for cut in cuts(config):
        why = refusal(cut, scheme, layer.params_dtype, device)
        if why is not None:
            return why
    packed = _layout(config, scheme, layer.params_dtype, current_device(device))
    return _no_kernel(layer, scheme, packed, device)


def _layout(config: Any, scheme: Scheme, act: torch.dtype, device: Device) -> str:
    """That of both weights of a layer."""
    gate_up, down = (
        Problem(
            m=1,
            n=cut.n,
            k=cut.k,
            group=cut.group(scheme),
            act=ACT_NAMES[act],
            has_zeros=not scheme.symmetric,
            experts=config.num_local_experts,
            top_k=1,
        )
        for cut in cuts(config)
    )
    return experts_layout(gate_up, down, device)


def asked(config: Any, scheme: Scheme, act: torch.dtype) -> Problem:
    """What this layer is asked for one token."""
    cut, _ = cuts(config)
    return Problem(
        m=1,
        n=cut.n,
        k=cut.k,
        group=cut.group(scheme),
        act=ACT_NAMES[act],
        has_zeros=not scheme.symmetric,
        experts=config.num_local_experts,
        top_k=min(config.experts_per_token, config.num_local_experts),
    )


def _no_kernel(layer: Any, scheme: Scheme, packed: str, device: torch.device) -> str | None:
    """Why no kernel for experts runs here, at decode or at prefill."""
    problem = asked(layer.moe_config, scheme, layer.params_dtype)
    for m in (1, PREFILL_ROWS):
        try:
            choose(replace(problem, m=m), current_device(device), packed)
        except Unsupported as error:
            return str(error).split("\n")[0]
    return None


class W4A16MoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one layer: gate above up [E, 2I, H], down [E, H, I], of which vLLM may have cut I."""

    def __init__(self, stored: Stored, scheme: Scheme, config: Any) -> None:
        super().__init__(config)
        self.stored, self.scheme = stored, scheme

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        self.act = params_dtype
        for half, cut in zip(("w13", "w2"), cuts(self.moe), strict=True):
            self._register(layer, half, num_experts, cut)
        self.kind = _vllm_warmup.Kind(asked(self.moe, self.scheme, params_dtype))
        _vllm_warmup.want(self.kind)

    def _register(self, layer: nn.Module, half: str, experts: int, cut: Cut) -> None:
        """Parameters in plain form under the names on disk, each with a loader that converts and cuts."""
        stored, groups = self.stored, cut.groups(self.scheme)

        def add(name: str, data: Tensor, load: Callable[..., None]) -> None:
            parameter = nn.Parameter(data, requires_grad=False)
            parameter.weight_loader = self._loader(layer, load)  # type: ignore[attr-defined]
            layer.register_parameter(f"{half}_{name}", parameter)

        def rows_and_columns(convert: Convert, whole: bool) -> Callable[..., None]:
            def load(target: Tensor, loaded: Tensor, shard: str) -> None:
                plain = convert(loaded)
                if shard == "w2":
                    width = target.shape[1]
                    plain = plain if whole else plain[:, self.moe.tp_rank * width :][:, :width]
                    target.copy_(plain[: target.shape[0]])
                else:
                    height = target.shape[0] // (2 if self.moe.is_act_and_mul else 1)
                    start = HALVES[shard] * height
                    target[start : start + height].copy_(plain[self.moe.tp_rank * height :][:height])

            return load

        whole = cut.shares_scales(self.scheme)
        (codes, to_codes), (scales, to_scales) = stored.codes, stored.scales
        add(codes, torch.zeros(experts, cut.n, cut.k // 8, dtype=torch.int32), rows_and_columns(to_codes, False))
        add(scales, torch.zeros(experts, cut.n, groups, dtype=self.act), rows_and_columns(to_scales, whole))
        if stored.zeros is not None:
            zeros, to_zeros = stored.zeros
            data = torch.full((experts, cut.n, groups), 8, dtype=torch.int32)  # as wide as on disk
            add(zeros, data, rows_and_columns(to_zeros, whole))
        for name, dtype in stored.ignored.items():
            add(name, torch.empty(experts, 0, dtype=dtype), _ignore)
        if stored.order is not None:
            lead = (experts, 2) if half == "w13" and self.moe.is_act_and_mul else (experts,)
            add(stored.order, in_order(cut, self.scheme, *lead), _load_order)

    def _loader(self, layer: Any, load: Callable[..., None]) -> Callable[..., bool | None]:
        """vLLM's calling convention around `load`: an expert of another rank is skipped."""

        def loader(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = layer.expert_map_manager.map_global_to_local(expert_id)
            if local != -1:
                load(param.data[local], loaded_weight, shard_id)
            return local != -1 if return_success else None

        loader.supports_moe_loading = True  # type: ignore[attr-defined]  # Llama 4 asks
        return loader

    def process_weights_after_loading(self, layer: Any) -> None:
        config = self.moe
        activation = config.activation.value.removesuffix(NO_GATE)
        experts = W4A16Experts(config.num_local_experts, activation=activation, gated=config.is_act_and_mul)
        for module, half, cut in zip((experts.w13, experts.w2), ("w13", "w2"), cuts(config), strict=True):
            stored = self.stored
            codes, scales = self._take(layer, half, stored.codes[0]), self._take(layer, half, stored.scales[0])
            zeros = None if stored.zeros is None else self._take(layer, half, stored.zeros[0]).to(torch.uint8)
            order = None if stored.order is None else self._take(layer, half, stored.order)
            for name in stored.ignored:
                self._take(layer, half, name)
            weight = experts_of(codes, scales, zeros, order, scheme=self.scheme, group=cut.group(self.scheme))
            layout = _layout(config, self.scheme, self.act, current_device(codes.device))
            packed = pack(weight, device=codes.device, act=self.act, layout=layout)
            say_served("experts", packed, layer.layer_name)
            module.set(packed)
        layer.w4a16 = experts
        _vllm_warmup.warm_up(self.kind, current_device(codes.device), lambda m: self._try(layer, m), logger.info)

    def _try(self, layer: Any, m: int) -> None:
        """m tokens, each to as many experts as vLLM sends one, all of them in turn."""
        config, device = self.moe, layer.w4a16.w13.get().codes.device
        slots = torch.arange(m * config.experts_per_token, device=device, dtype=_vllm_warmup.IDS)
        ids = (slots % config.num_local_experts).view(m, -1)
        x = torch.zeros(m, config.hidden_dim, dtype=self.act, device=device)
        self.apply(layer, x, torch.ones_like(ids, dtype=torch.float32), ids)

    def _take(self, layer: nn.Module, half: str, name: str) -> Tensor:
        """A loaded tensor, which the layer holds no longer."""
        data: Tensor = getattr(layer, f"{half}_{name}").data
        delattr(layer, f"{half}_{name}")
        return data

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        """What vLLM's routers are told to name experts in: the warm-up compiled for it."""
        return _vllm_warmup.IDS

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: the scales are w4a16's own, and no kernel of vLLM reads them."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """vLLM's runner computes the shared experts itself."""
        experts: W4A16Experts = layer.w4a16
        return moe(
            x,
            experts.w13.get(),
            experts.w2.get(),
            topk_weights,
            topk_ids,
            activation=experts.activation,
            gated=experts.gated,
            weight_input=layer.apply_router_weight_on_input,
            expert_map=layer.expert_map,
        )


def _ignore(target: Tensor, loaded: Tensor, shard: str) -> None:
    pass


def _load_order(target: Tensor, loaded: Tensor, shard: str) -> None:
    (target if target.ndim == 1 else target[HALVES[shard]]).copy_(loaded)
