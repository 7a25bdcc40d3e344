"""Launch: one Triton kernel call as data: launchers run it, `codegen` compiles it for a device that is not here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One call of a Triton or Gluon kernel.

    fn         the jit function
    grid       programs along x, y, z
    args       run-time arguments by name in the order of the signature: tensors, integers, floats, tensor descriptors
    constants  constexpr arguments by name
    options    num_warps, num_stages and the like
    Tensors may lie on the CPU or be meta: then the launch cannot run here, but it can be compiled or emulated.
    """

    fn: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launches it on the device of its tensors (or in Triton's interpreter)."""
        self.fn[self.grid](*self.args.values(), **self.constants, **self.options)
