"""Launch: one Triton kernel call as data: launchers run it, `codegen` compiles it for a device that is not here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ..compat import launcher
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


Again = Callable[[Tensor, Tensor], None]


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


def repeat(launches: tuple[Launch, ...], *, out: Tensor, x: Tensor, fixed: Iterable[Tensor | None]) -> Again | None:
    """(out, x) -> the same launches, for tensors of the same shapes, strides and alignment: no plan, no look-up.

    fixed are the weight's tensors and the bias, held by address alone: whoever calls vouches that they are there.
    What else the launches name is workspace, and new at every call. None where the plan copied x.
    """
    slots = {out.data_ptr(): 0, x.data_ptr(): 1}
    addresses = {tensor.data_ptr() for tensor in fixed if tensor is not None}
    spaces: list[tuple[torch.Size, torch.dtype]] = []
    steps = []
    for launch in launches:
        values: list[Any] = [*launch.args.values(), *launch.constants.values()]
        fills: list[tuple[int, int]] = []  # (argument, slot): pointers
        boxes: list[tuple[int, int]] = []  # and descriptors
        for i, value in enumerate(values):
            described = hasattr(value, "block_shape")
            tensor = value.base if described else value
            if not isinstance(tensor, Tensor):
                continue
            address = tensor.data_ptr()
            values[i] = _based(value, _At(address)) if described else address
            if address in addresses:
                continue
            if address not in slots:
                slots[address] = 2 + len(spaces)
                spaces.append((tensor.shape, tensor.dtype))
            (boxes if described else fills).append((i, slots[address]))
        steps.append((launch.compiled(), launch.grid, values, fills, boxes))
    if all(slot != 1 for *_, fills, boxes in steps for _, slot in (*fills, *boxes)):
        return None  # the plan copied x

    def again(out: Tensor, x: Tensor) -> None:
        held = [out, x, *[out.new_empty(shape, dtype=dtype) for shape, dtype in spaces]]
        pointers = [tensor.data_ptr() for tensor in held]
        for run, grid, template, fills, boxes in steps:
            values = template.copy()
            for i, slot in fills:
                values[i] = pointers[slot]
            for i, slot in boxes:
                values[i] = _based(values[i], held[slot])
            run(grid, *values)

    return again
