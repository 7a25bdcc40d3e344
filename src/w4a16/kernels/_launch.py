"""Launch: one Triton kernel call as data: launchers run it, `codegen` compiles it for a device that is not here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
    Tensors may lie on the CPU or be meta: then the launch cannot run here, but it can be compiled or emulated.
    """

    fn: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def compile_options(self) -> dict[str, Any]:
        """FMA contraction is pinned, as Triton's default for it changes with 3.10."""
        return {"enable_fp_fusion": True, **self.options}

    def run(self) -> None:
        """Launches it on the device of its tensors (or in Triton's interpreter).

        Triton's own path binds, specialises and looks up by string, 20 us and more a call; a kernel that it compiled
        once is found here by what it specialises on, and launched directly.
        """
        args, grid = self.args.values(), self.grid
        key = (id(self.fn), *map(_specialised, args), *self.constants.values(), *self.options.values())
        kernel = _compiled.get(key)
        if kernel is not None:
            kernel[(*grid, 1, 1)[:3]](*args, *self.constants.values())
            return
        kernel = self.fn[grid](*args, **self.constants, **self.compile_options)
        if kernel is not None:  # the interpreter compiles nothing
            assert [*self.args, *self.constants] == self.fn.arg_names
            _compiled[key] = kernel


def _specialised(value: Any) -> Any:
    """What Triton's compiled code may depend on in a run-time argument."""
    if isinstance(value, Tensor):
        near = not _ON_AMD or value.untyped_storage().nbytes() < 1 << 31  # 32-bit offsets serve there
        return value.dtype, value.device.index, value.data_ptr() % 16 == 0, near
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value < 1 << 31
    return type(value)
