"""The opaque operators w4a16::linear and w4a16::moe: schemas, fakes, autocast, and the choice of a kernel per call.

The row count is read here, inside the operator, so a graph traced at one M runs right at every other.
`torch.library.Library` has half the call overhead of `torch.library.custom_op`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .device import current_device
from .dispatch import Served, choose, launcher, note, plan_of, serve_linear
from .errors import BadInput, explain_mismatch
from .layouts import PackedWeight
from .moe.activations import ACTIVATIONS
from .problem import ACT_NAMES, Problem
from .roofline import scopes

_LIB = torch.library.Library("w4a16", "DEF")
_LIB.define(
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias,"
    " str layout, int n, int k, int group, Tensor? dense=None) -> Tensor"
)
_LIB.define(
    "moe(Tensor x, Tensor topk_weights, Tensor topk_ids,"
    " Tensor codes13, Tensor scales13, Tensor? zeros13, Tensor? perm13,"
    " Tensor codes2, Tensor scales2, Tensor? zeros2, Tensor? perm2, Tensor? expert_map,"
    " str layout, int hidden, int intermediate, int group13, int group2,"
    " str activation, bool gated, bool weight_input) -> Tensor"
)


def _check(what: str, got: object, wanted: object, then: str) -> None:
    if got != wanted:
        raise BadInput(explain_mismatch(what, got=got, wanted=wanted, then=then))


def _check_x(x: Tensor, k: int, act: torch.dtype, where: torch.device) -> None:
    _check("x last dimension (K)", x.shape[-1] if x.ndim else None, k, "Pass activations [..., K] of this layer.")
    if act not in ACT_NAMES:
        wanted = "bfloat16, float16 or float32"
        raise BadInput(explain_mismatch("scales dtype", got=act, wanted=wanted, then="Pack the weight again."))
    _check("x dtype", x.dtype, act, "Cast x, or pack the weight with act=x.dtype.")
    _check("x device", x.device, where, "Move x to the weight's device.")


def _check_bias(bias: Tensor | None, n: int, act: torch.dtype, where: torch.device) -> None:
    if bias is not None:
        _check("bias shape", tuple(bias.shape), (n,), "Pass bias [N].")
        _check("bias dtype and device", (bias.dtype, bias.device), (act, where), "Give the bias the weight's.")


def _linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    layout: str,
    n: int,
    k: int,
    group: int,
    dense: Tensor | None = None,
) -> Tensor:
    call = _like(x, codes, scales, zeros, bias, dense, layout, n, k, group) if perm is None and x.is_cuda else None
    if call in _repeats and not scopes.enabled:
        again, served = _repeats[call]
        note(served.stem, served.problem)
        out = x.new_empty((*x.shape[:-1], n))
        again(out, x)
        return out
    _check_x(x, k, scales.dtype, codes.device)
    _check_bias(bias, n, scales.dtype, codes.device)
    out = x.new_empty((*x.shape[:-1], n))
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if m == 0:
        return out
    if perm is not None:
        rows = rows.index_select(1, perm)
    elif rows.stride(1) != 1:
        rows = rows.contiguous()
    if rows.data_ptr() != x.data_ptr():
        call = None
    weight = PackedWeight(
        layout=layout, codes=codes, scales=scales, zeros=zeros, perm=perm, n=n, k=k, group=group, dense=dense
    )
    served = serve_linear(x.device, layout, m, n, k, group, x.dtype, zeros is not None, dense is not None)
    note(served.stem, served.problem)
    launch = served.launch
    if scopes.enabled:
        launch = scopes.scoped(launch, served.stem, served.problem)
    elif call is not None and served.plan is not None:
        launch = functools.partial(_first, call, served)
    launch(out=out.view(m, n), x=rows, weight=weight, bias=bias, tile=served.tile)
    return out


Again = Callable[..., None]
Fixed = tuple[Tensor | None, ...]

# Calls that were made before, by all that decides what they launch. Weights are known by their addresses: another
# weight at the same addresses, of the same sizes, is launched alike.
_repeats: dict[Any, tuple[Again, Served]] = {}
# What layers alike share at one row count, by all that decides it but the weight's addresses: a plan takes 0.3 ms of
# the host, and a server meets a new row count at most of its prefill steps.
_plans: dict[Any, Callable[[Fixed], Again]] = {}
_MOST_REPEATS = 1 << 14


def _like(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    dense: Tensor | None,
    layout: str,
    n: int,
    k: int,
    group: int,
) -> tuple[object, ...]:
    """Equal for calls that launch the same kernels with the same arguments, but for the addresses of x and out."""
    return (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        x.data_ptr() % 32,
        codes.data_ptr(),
        scales.data_ptr(),
        scales.dtype,
        None if zeros is None else zeros.data_ptr(),
        None if bias is None else (bias.data_ptr(), bias.dtype, bias.shape),
        dense is None,
        layout,
        n,
        k,
        group,
    )


def _first(
    call: tuple[object, ...],
    served: Served,
    *,
    out: Tensor,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    tile: object,
) -> None:
    """Plans and launches, or launches as for a layer alike, and remembers how for calls like this one."""
    from .kernels._launch import repeat

    assert served.plan is not None
    fixed = (weight.codes, weight.scales, weight.zeros, bias)
    sizes = (weight.n, weight.k, weight.group, weight.dense is None)
    alike = (served.stem, tile, sizes, x.device, *map(_form, (x, *fixed)))
    bind = _plans.get(alike)
    if bind is None:
        launches = served.plan(out=out, x=x, weight=weight, bias=bias, tile=tile)
        for launch in launches:
            launch.run()
        bind = repeat(launches, given=(out, x), fixed=fixed)
        if bind is None:
            return
        _remember(_plans, alike, bind)
        again = bind(fixed)
    else:
        again = bind(fixed)
        again(out, x)
    _remember(_repeats, call, (again, served))


def _form(tensor: Tensor | None) -> object:
    """What a plan reads of a tensor, and Triton specialises on."""
    if tensor is None:
        return None
    near = tensor.untyped_storage().nbytes() < 1 << 31
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 32, near


def _remember(memory: dict[Any, Any], key: object, value: object) -> None:
    if len(memory) >= _MOST_REPEATS:
        memory.clear()
    memory[key] = value


def _moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    codes13: Tensor,
    scales13: Tensor,
    zeros13: Tensor | None,
    perm13: Tensor | None,
    codes2: Tensor,
    scales2: Tensor,
    zeros2: Tensor | None,
    perm2: Tensor | None,
    expert_map: Tensor | None,
    layout: str,
    hidden: int,
    intermediate: int,
    group13: int,
    group2: int,
    activation: str,
    gated: bool,
    weight_input: bool,
) -> Tensor:
    _check_moe(x, topk_weights, topk_ids, scales13, scales2, codes13, hidden, activation, weight_input)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, top_k, experts = x.shape[0], topk_ids.shape[1], codes13.shape[0]
    if tokens == 0:
        return out
    if expert_map is not None:
        topk_ids = expert_map[topk_ids.long()]
    n13 = intermediate * (2 if gated else 1)
    w13 = PackedWeight(
        layout=layout, codes=codes13, scales=scales13, zeros=zeros13, perm=perm13, n=n13, k=hidden, group=group13
    )
    w2 = PackedWeight(
        layout=layout, codes=codes2, scales=scales2, zeros=zeros2, perm=perm2, n=hidden, k=intermediate, group=group2
    )
    problem = Problem(
        m=tokens,
        n=n13,
        k=hidden,
        group=group13,
        act=ACT_NAMES[x.dtype],
        has_zeros=zeros13 is not None,
        experts=experts,
        top_k=min(top_k, experts),
    )
    choice = choose(problem, current_device(x.device), layout)
    note(choice.row.stem, problem)
    launch = launcher(choice.row.stem)
    arguments: dict[str, Any] = {
        "out": out,
        "x": x,
        "w13": w13,
        "w2": w2,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "activation": activation,
        "gated": gated,
        "weight_input": weight_input,
        "linear": _expert_linear,
        "tile": choice.tile,
    }
    if scopes.enabled:
        facts = scopes.moe_facts(topk_ids, problem, intermediate, choice.tile)
        launch = scopes.scoped(launch, choice.row.stem, problem, facts)
    elif x.is_cuda and perm13 is None and perm2 is None and (plan := plan_of(choice.row.stem)) is not None:
        launch = functools.partial(_experts, choice.row.stem, plan)
    launch(**arguments)
    return out


def _experts(stem: str, plan: Callable[..., Any], **arguments: Any) -> None:
    """Launches an expert layer as one alike was at these sizes, or plans it."""
    from .kernels._launch import repeat

    w13, w2 = arguments["w13"], arguments["w2"]
    given = tuple(arguments[name] for name in ("out", "x", "topk_weights", "topk_ids"))
    fixed = (w13.codes, w13.scales, w13.zeros, w2.codes, w2.scales, w2.zeros)
    asked = tuple(arguments[name] for name in ("tile", "activation", "gated", "weight_input"))
    sizes = (w13.n, w13.k, w13.group, w2.n, w2.k, w2.group)
    alike = (stem, asked, sizes, given[1].device, *map(_form, (*given[1:], *fixed)))
    bind = _plans.get(alike)
    if bind is not None:
        bind(fixed)(*given)
        return
    launches = plan(**arguments)
    for launch in launches:
        launch.run()
    bind = repeat(launches, given=given, fixed=fixed)
    if bind is not None:
        _remember(_plans, alike, bind)


def _expert_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """fp32 [M, N] = x [M, K] @ W^T of one expert, fp32 in, by the kernel that serves its row count."""
    m, w = x.shape[0], weight
    served = serve_linear(x.device, w.layout, m, w.n, w.k, w.group, x.dtype, w.has_zeros)
    out = x.new_empty((m, w.n), dtype=torch.float32)
    rows = x if w.perm is None else x.index_select(1, w.perm)
    served.launch(out=out, x=rows, weight=w, bias=None, tile=served.tile)
    return out


def _check_moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    scales13: Tensor,
    scales2: Tensor,
    codes13: Tensor,
    hidden: int,
    activation: str,
    weight_input: bool,
) -> None:
    _check("x dimensions", x.ndim, 2, "Pass tokens [T, H].")
    _check_x(x, hidden, scales13.dtype, codes13.device)
    _check("scales dtype of w2", scales2.dtype, scales13.dtype, "Pack both weights with the same act.")
    _check("topk_weights shape", topk_weights.shape, topk_ids.shape, "Pass both as [T, top_k].")
    _check("topk_ids tokens", topk_ids.shape[0], x.shape[0], "Pass one row of ids a token.")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise BadInput(
            explain_mismatch("topk_ids dtype", got=topk_ids.dtype, wanted="int32 or int64", then="Cast the ids.")
        )
    if activation not in ACTIVATIONS:
        wanted = ", ".join(ACTIVATIONS)
        raise BadInput(explain_mismatch("activation", got=activation, wanted=wanted, then="Name one of these."))
    if weight_input:
        _check("top_k with router weights on the input", topk_ids.shape[1], 1, "Weight the output instead.")


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    layout: str,
    n: int,
    k: int,
    group: int,
    dense: Tensor | None = None,
) -> Tensor:
    _check_x(x, k, scales.dtype, codes.device)
    _check_bias(bias, n, scales.dtype, codes.device)
    return x.new_empty((*x.shape[:-1], n))


def _moe_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _under_autocast(op: torch._ops.OpOverload, key: str) -> None:
    """Autocast casts x to the dtype the weight was packed for, whatever dtype autocast would pick."""
    scales_at = [a.name for a in op._schema.arguments].index("scales" if op is linear_op else "scales13")
    skip = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, *rest: object) -> Tensor:
        scales = rest[scales_at - 1]
        assert isinstance(scales, Tensor)
        with torch._C._ExcludeDispatchKeyGuard(skip):
            out: Tensor = op(x.to(scales.dtype), *rest)
            return out

    _LIB.impl(op._schema.name.split("::")[1], cast, key)


for _key in ("CPU", "CUDA"):
    _LIB.impl("linear", _linear, _key)
    _LIB.impl("moe", _moe, _key)
torch.library.register_fake("w4a16::linear", _linear_fake, lib=_LIB)
torch.library.register_fake("w4a16::moe", _moe_fake, lib=_LIB)

linear_op = torch.ops.w4a16.linear.default


def linear_call(x: Tensor, *rest: Any) -> Tensor:
    """`linear_op`, without torch's dispatcher where nothing looks on: eager, on a GPU, a plain tensor."""
    if (
        type(x) is Tensor
        and x.is_cuda
        and not torch.compiler.is_compiling()
        and not scopes.enabled
        and not torch.is_autocast_enabled("cuda")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
    ):
        return _linear(x, *rest)
    out: Tensor = linear_op(x, *rest)
    return out


moe_op = torch.ops.w4a16.moe.default

for _key in ("AutocastCPU", "AutocastCUDA"):
    _under_autocast(linear_op, _key)
    _under_autocast(moe_op, _key)
