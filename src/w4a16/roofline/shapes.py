"""The matrix product behind an operator, from the sizes of its inputs (recorded with record_shapes=True)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from ..problem import Problem
from .labels import Scope
from .model import Cost, dense_cost
from .names import W4A16, kind_of

_BYTES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2}
_FLOATS = {"float": "fp32", "Half": "fp16", "BFloat16": "bf16"}
_CODES = {"int": 8, "unsigned char": 2, "signed char": 2, "char": 2}  # 4-bit codes in an element of that type
_OURS = "w4a16::linear"
_PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::_scaled_mm": (0, 1),
    "aten::mv": (0, 1),
    "aten::addmv": (1, 2),
}


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of an operator: its sizes and its type as the profiler writes it."""

    dims: tuple[int, ...]
    type: str

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def codes(self) -> int:
        """4-bit codes that it can hold."""
        return self.size * _CODES.get(self.type, 0)


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """A dense product of [M, K] and [K, N], `batch` of them; act is the key of the peak that it is held against."""

    m: int
    n: int
    k: int
    batch: int
    element_bytes: int
    act: str = "bf16"

    @property
    def shape(self) -> str:
        return (f"{self.batch}*" if self.batch > 1 else "") + f"{self.m}x{self.n}x{self.k}"

    def cost(self) -> Cost:
        return dense_cost(self.batch, self.m, self.n, self.k, self.element_bytes)


def is_product(name: str) -> bool:
    """Whether an operator is a dense product, its sizes known or not."""
    return name in _PRODUCTS


def product_of(name: str, arguments: dict[str, Any]) -> Gemm | Scope | None:
    """The dense product or the W4A16 problem of one operator event's `args`; None when they do not tell."""
    if not (is_product(name) or name == _OURS or kind_of(name).kind == W4A16):
        return None
    dims = arguments.get("Input Dims", arguments.get("Input dims"))
    types = arguments.get("Input type", ())
    if not isinstance(dims, list) or len(types) != len(dims):
        return None
    inputs = tuple(
        Input(dims=tuple(d) if all(isinstance(size, int) for size in d) else (), type=str(t).removeprefix("c10::"))
        for d, t in zip(dims, types, strict=True)
    )
    if is_product(name):
        return _dense(name, inputs)
    if name == _OURS:
        return _ours(inputs, tuple(map(str, arguments.get("Concrete Inputs", ()))))
    return _foreign(name, inputs)


@functools.lru_cache(maxsize=1 << 14)
def _dense(name: str, inputs: tuple[Input, ...]) -> Gemm | None:
    left, right = _PRODUCTS[name]
    if len(inputs) <= right:
        return None
    a, b = inputs[left].dims, inputs[right].dims
    if len(b) == 1:
        b = (*b, 1)
    if len(a) < 2 or len(a) != len(b) or a[-1] != b[-2]:
        return None
    size = 1 if inputs[left].type.startswith("Float8") else _BYTES.get(inputs[left].type, 2)
    act = _FLOATS.get(inputs[left].type, "bf16")
    return Gemm(m=a[-2], n=b[-1], k=a[-1], batch=math.prod(a[:-2]), element_bytes=size, act=act)


@functools.lru_cache(maxsize=1 << 14)
def _ours(inputs: tuple[Input, ...], concrete: tuple[str, ...]) -> Scope | None:
    """w4a16::linear without its range: x, codes, scales, zeros, perm, bias, layout, n, k, group."""
    if len(inputs) != 10 or not all(text.isdigit() for text in concrete[7:]) or inputs[0].type not in _FLOATS:
        return None
    n, k, group = map(int, concrete[7:])
    m, zeros, act = math.prod(inputs[0].dims[:-1]), bool(inputs[3].dims), _FLOATS[inputs[0].type]
    return Scope(stem="linear", problem=Problem(m=m, n=n, k=k, group=group, act=act, has_zeros=zeros))


@functools.lru_cache(maxsize=1 << 14)
def _foreign(name: str, inputs: tuple[Input, ...]) -> Scope | None:
    """Anyone's W4A16 linear op: x is its first float matrix, codes the largest integer one; the rest is arithmetic."""
    floats = [i for i in inputs if i.type in _FLOATS and len(i.dims) > 1 and i.size]
    integers = [i for i in inputs if i.type in _CODES and len(i.dims) > 1 and i.size]
    if not floats or not integers:
        return None
    x, codes = floats[0], max(integers, key=lambda i: i.codes)
    k, act = x.dims[-1], _FLOATS[x.type]
    n, rest = divmod(codes.codes, k)
    scales = [i for i in floats[1:] if len(i.dims) == 2 and n in i.dims and k % (i.size // n) == 0]
    if rest or not scales or len(codes.dims) > 2:
        return None
    groups = scales[-1].size  # an output among the inputs comes before them
    zeros = sum(i.size == groups for i in scales) > 1 or any(i.codes == groups for i in integers if i is not codes)
    problem = Problem(m=x.size // k, n=n, k=k, group=n * k // groups, act=act, has_zeros=zeros)
    return Scope(stem=kind_of(name).op, problem=problem)
