"""vLLM's linear layers on w4a16::linear: parameters to load into, packed once loaded, one opaque call a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

from ..api import pack
from ..checkpoints import Scheme
from ..device import current_device
from ..errors import Unsupported
from ..layouts import PackedWeight
from ..nn import W4A16Linear
from ..ops import linear_call
from ..problem import ACT_NAMES, Problem
from . import _vllm_warmup
from ._vllm_formats import Convert, Cut, Stored, in_order, refusal, weight_of

logger = init_logger("vllm.w4a16")
_said: set[str] = set()
# vLLM's names for the parts of a fused qkv projection
PARTS = {"q": 0, "k": 1, "v": 2}


def say_once(sentence: str, prefix: str) -> None:
    """One line of vLLM's log for each reason, with the first layer that has it."""
    if sentence not in _said:
        _said.add(sentence)
        logger.warning("%s stays on vLLM's own kernel: %s.", prefix, sentence)


def say_served(what: str, packed: PackedWeight, prefix: str) -> None:
    """One line for each kind of weight that w4a16 serves, with the first layer of that kind."""
    kind = "asymmetric" if packed.has_zeros else "symmetric"
    order = ", act-order" if packed.perm is not None else ""
    act = ACT_NAMES[packed.act]
    line = f"w4a16 serves {what}: {kind}, group {packed.group}{order}, {act}, layout {packed.layout}"
    if line not in _said:
        _said.add(line)
        logger.info("%s (first: %s)", line, prefix)


def refuse(why: str, prefix: str) -> Unsupported:
    return Unsupported(f"{prefix}: {why}. vLLM has no kernel of its own for this layer.")


@register_weight_loader_v2_supported_method
class W4A16LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A 4-bit linear layer. `stock` makes vLLM's own method for what w4a16 refuses; None where vLLM has none."""

    def __init__(self, stored: Stored, scheme: Scheme, prefix: str, stock: Callable[[], Any] | None) -> None:
        self.stored, self.scheme, self.prefix, self.stock = stored, scheme, prefix, stock

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        cut = Cut(n=sum(output_partition_sizes), k=input_size_per_partition, whole_k=input_size)
        why = refusal(cut, self.scheme, params_dtype, torch.empty(0).device)
        if why is not None:
            if self.stock is None:
                raise refuse(why, self.prefix)
            say_once(why, self.prefix)
            stock = self.stock()
            layer.quant_method = stock
            stock.create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra,
            )
            return
        self.cut, self.rows, self.act = cut, list(output_partition_sizes), params_dtype
        self._register(layer, extra["weight_loader"], output_size)
        problem = Problem(
            m=1,
            n=cut.n,
            k=cut.k,
            group=cut.group(self.scheme),
            act=ACT_NAMES[params_dtype],
            has_zeros=not self.scheme.symmetric,
        )
        # the bias itself is made after this
        self.kind = _vllm_warmup.Kind(problem, getattr(layer, "has_bias", False) and not layer.skip_bias_add)
        _vllm_warmup.want(self.kind)

    def _register(self, layer: nn.Module, load: Callable[..., Any], output_size: int) -> None:
        """Parameters in plain form under the names on disk, each with a loader that converts what it is given."""
        stored, n, groups = self.stored, self.cut.n, self.cut.groups(self.scheme)

        def add(name: str, data: Tensor, convert: Convert, shared: bool = False) -> None:
            def converted(param: Any, loaded: Tensor, *part: Any, **named: Any) -> Any:
                # zero points packed along N come back padded to whole words
                return load(param, convert(loaded)[:output_size], *part, **named)

            kind: dict[str, Any] = {"data": data, "weight_loader": converted, "output_dim": 0}
            parameter = ChannelQuantScaleParameter(**kind) if shared else ModelWeightParameter(input_dim=1, **kind)
            layer.register_parameter(name, parameter)

        codes, scales, zeros = stored.codes, stored.scales, stored.zeros
        shared = self.cut.shares_scales(self.scheme)
        add(codes[0], torch.zeros(n, self.cut.k // 8, dtype=torch.int32), codes[1])
        add(scales[0], torch.zeros(n, groups, dtype=self.act), scales[1], shared)
        if zeros is not None:
            # as wide as on disk, or vLLM warns of each
            add(zeros[0], torch.full((n, groups), 8, dtype=torch.int32), zeros[1], shared)
        for name, dtype in stored.ignored.items():
            nothing = torch.empty(0, dtype=dtype)
            layer.register_parameter(name, BasevLLMParameter(data=nothing, weight_loader=_ignore))
        if stored.order is not None:
            orders = in_order(self.cut, self.scheme, len(self.rows))
            layer.register_parameter(stored.order, BasevLLMParameter(data=orders, weight_loader=_load_order))

    def process_weights_after_loading(self, layer: Any) -> None:
        stored = self.stored
        codes, scales = (getattr(layer, name).data for name, _ in (stored.codes, stored.scales))
        zeros = None if stored.zeros is None else getattr(layer, stored.zeros[0]).data.to(torch.uint8)
        orders = None if stored.order is None else getattr(layer, stored.order).data
        for name in stored.names:
            delattr(layer, name)
        # projections fused into one layer whose columns are sorted differently are multiplied one by one
        apart = orders is not None and bool((orders != orders[0]).any())
        rows = self.rows if apart else [self.cut.n]
        layer.w4a16 = nn.ModuleList()
        start = 0
        for index, size in enumerate(rows):
            span = slice(start, start + size)
            weight = weight_of(
                codes[span],
                scales[span],
                None if zeros is None else zeros[span],
                None if orders is None else orders[index],
                scheme=self.scheme,
                group=self.cut.group(self.scheme),
            )
            packed = pack(weight, device=codes.device, act=self.act)
            say_served("linear layers", packed, self.prefix)
            layer.w4a16.append(W4A16Linear.of(packed))
            start += size
        x = torch.zeros(1, self.cut.k, dtype=self.act, device=codes.device)
        bias, device = layer.bias if self.kind.bias else None, current_device(codes.device)
        _vllm_warmup.warm_up(self.kind, device, lambda m: self.apply(layer, x.repeat(m, 1), bias), logger.info)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        parts = layer.w4a16
        if len(parts) == 1:
            return _multiply(parts[0], x, bias)
        biases = [None] * len(parts) if bias is None else bias.split(self.rows)
        return torch.cat([_multiply(part, x, own) for part, own in zip(parts, biases, strict=True)], dim=-1)


def _multiply(w: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """One opaque call: the row count is read inside, so a graph traced at prefill decodes with the decode kernel."""
    return linear_call(x, w.codes, w.scales, w.zeros, w.perm, bias, w.layout, w.n, w.k, w.group, w.dense)


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _load_order(param: Any, loaded: Tensor, part: str | int | tuple[int, ...] | None = None) -> None:
    """g_idx of one projection of a fused layer, or of all that one tensor on disk covers."""
    rows = slice(None) if part is None else PARTS[part] if isinstance(part, str) else part
    param.data[rows if not isinstance(rows, tuple) else list(rows)] = loaded.to(param.data.device, torch.int32)
