"""Launch: one Triton kernel call as data: launchers run it, `codegen` compiles it for a device that is not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ..compat import launcher, settle_key
from ._compiling import compiling

_ON_AMD = torch.version.hip is not None
_compiled: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One call of a Triton or Gluon kernel.

    fn         the jit function
    grid       programs along x, y, z
    args       run-time arguments by name in the order of the signature: tensors, integers, floats, tensor descriptors
    constants  constexpr arguments by name, in the order of the signature, after all others
    options    num_warps, num_stages and the like; `compile_options` adds what every kernel here is compiled with
    cluster    programs along x that Hopper places together (thread block cluster); `grid` counts clusters then
    Tensors may lie on the CPU or be meta: then the launch cannot run here, but it can be compiled or emulated.
    """

    fn: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    cluster: int = 1

    @property
    def compile_options(self) -> dict[str, Any]:
        """FMA contraction is pinned, as Triton's default for it changes with 3.10."""
        return {"enable_fp_fusion": True, **self.options}

    def run(self) -> None:
        """Launches it on the device of its tensors (or in Triton's interpreter).

        Triton's own path binds, specialises and looks up by string, 20 us and more a call; a kernel that it compiled
        once is found here by what it specialises on, and launched directly.
        """
        assert [*self.args, *self.constants] == self.fn.arg_names
        if knobs.runtime.interpret:
            self.fn[self.grid](*self.args.values(), **self.constants, **self.compile_options)
        else:
            self.compiled()(self.grid, *self.args.values(), *self.constants.values())

    def compiled(self) -> Callable[..., None]:
        """The machine code on this device, as a function of the grid and all arguments."""
        args = self.args.values()
        key = (id(self.fn), *map(_specialised, args), *self.constants.values(), *self.options.values())
        launch = _compiled.get(key)
        if launch is None:
            with compiling(self.fn.__name__, "TRITON_CACHE_DIR"):
                settle_key(self.fn)
                kernel = self.fn.warmup(*args, **self.constants, **self.compile_options, grid=self.grid)
                launch = _compiled[key] = launcher(kernel, self.cluster)
        return launch


def runs(plan: Callable[..., tuple[Launch, ...]]) -> Callable[..., None]:
    """The launcher of a kernel: what its plan says for the same arguments, in order."""

    def run(**arguments: Any) -> None:
        for launch in plan(**arguments):
            launch.run()

    return run


def _specialised(value: Any) -> Any:
    """What Triton's compiled code may depend on in a run-time argument."""
    if isinstance(value, Tensor):
        near = not _ON_AMD or value.untyped_storage().nbytes() < 1 << 31  # 32-bit offsets serve there
        return value.dtype, value.device.index, value.data_ptr() % 16 == 0, near
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value < 1 << 31
    if hasattr(value, "block_shape"):  # a descriptor of TMA
        return value.base.dtype, value.base.device.index, *value.block_shape, value.layout
    return type(value)


Again = Callable[..., None]
Fixed = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class _At:
    """The base of a descriptor of TMA whose tensor is held by address alone."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _based(descriptor: Any, base: Any) -> Any:
    """The same boxes of another tensor, unchecked: to make a descriptor anew takes 10 us."""
    other = object.__new__(type(descriptor))
    other.__dict__ = descriptor.__dict__ | {"base": base}
    return other


def _place(address: int, tensors: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """In which of the tensors an address lies, and how many bytes from its start: the nearest."""
    found = []
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            behind = address - tensor.data_ptr()
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if 0 <= behind <= last * tensor.itemsize:
                found.append((behind, i))
    behind, i = min(found, default=(0, -1))
    return None if i < 0 else (i, behind)


def repeat(launches: tuple[Launch, ...], *, given: tuple[Tensor, ...], fixed: Fixed) -> Callable[[Fixed], Again] | None:
    """fixed -> (*given) -> the same launches for tensors of the same shapes, strides and alignment, without a plan.

    given are the output and what a call passes; fixed are a weight's tensors and the bias, held by address alone:
    whoever calls vouches that they are there. A launch may name a part of them. What else the launches name is
    workspace, and new at every call. None where the plan copied what was given, or names a part of its workspace.
    """
    held: list[Tensor] = [*given]
    spaces: list[int] = []  # bytes
    steps = []
    for launch in launches:
        values: list[Any] = [*launch.args.values(), *launch.constants.values()]
        weights: list[tuple[int, int, int]] = []  # (argument, which of fixed, bytes from its start)
        fills: list[tuple[int, int, int]] = []  # (argument, slot, bytes): pointers
        boxes: list[tuple[int, int, int]] = []  # and descriptors
        for i, value in enumerate(values):
            described = hasattr(value, "block_shape")
            tensor = value.base if described else value
            if not isinstance(tensor, Tensor):
                continue
            address = tensor.data_ptr()
            values[i] = _based(value, _At(address)) if described else address
            if (place := _place(address, fixed)) is not None:
                weights.append((i, *place))
                continue
            if (place := _place(address, held)) is None:
                if tensor.storage_offset():
                    return None
                place = len(held), 0
                held.append(tensor)
                spaces.append(tensor.untyped_storage().nbytes())
            (boxes if described else fills).append((i, *place))
        steps.append((launch.compiled(), launch.grid, values, weights, fills, boxes))
    named = {slot for *_, fills, boxes in steps for _, slot, _ in (*fills, *boxes)}
    if not named.issuperset(range(len(given))):
        return None

    def bind(fixed: Fixed) -> Again:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in fixed]
        bound = []
        for run, grid, values, weights, fills, boxes in steps:
            mine = values.copy()
            for i, j, behind in weights:
                at = addresses[j] + behind
                mine[i] = _based(mine[i], _At(at)) if hasattr(mine[i], "block_shape") else at
            bound.append((run, grid, mine, fills, boxes))

        def again(*given: Tensor) -> None:
            held = [*given, *[given[0].new_empty(size, dtype=torch.uint8) for size in spaces]]
            pointers = [tensor.data_ptr() for tensor in held]
            for run, grid, template, fills, boxes in bound:
                values = template.copy()
                for i, slot, behind in fills:
                    values[i] = pointers[slot] + behind
                for i, slot, behind in boxes:
                    values[i] = _based(values[i], _At(pointers[slot] + behind) if behind else held[slot])
                run(grid, *values)

        return again

    return bind
