"""The arguments that every kernel over layout SKINNY begins with, by name and in the order of its signature."""

from __future__ import annotations

from torch import Tensor

from ..layouts import PackedWeight


def pointers(out: Tensor, x: Tensor, weight: PackedWeight) -> dict[str, Tensor | None]:
    """What is written, what is read, and the weight, of one linear layer or of all experts."""
    return {
        "out_ptr": out,
        "x_ptr": x,
        "codes_ptr": weight.codes,
        "scales_ptr": weight.scales,
        "zeros_ptr": weight.zeros,
    }


def strides(out: Tensor, x: Tensor, weight: PackedWeight) -> dict[str, int]:
    """From row to row of each; of experts' weights also from expert to expert, before it."""
    found = {"out_stride": out.stride(0), "x_stride": x.stride(0)}
    for name in ("codes", "scales", "zeros"):
        tensor = getattr(weight, name)
        if weight.experts:
            found[f"{name}_expert"] = first_stride(tensor)
        found[f"{name}_stride"] = 0 if tensor is None else tensor.stride(-2)
    return found


def first_stride(tensor: Tensor | None) -> int:
    """Of a tensor that a kernel may do without."""
    return 0 if tensor is None else tensor.stride(0)
