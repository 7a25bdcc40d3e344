"""Floating-point operations as the hardware does them where numpy does otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_UNSIGNED = {2: np.uint16, 4: np.uint32}


def maximum(a: Array, b: Array) -> Array:
    """The number, of a number and a NaN; +0 of two zeros."""
    return _equal_bits(a, b, np.fmax(a, b), np.bitwise_and)


def minimum(a: Array, b: Array) -> Array:
    """The number, of a number and a NaN; -0 of two zeros."""
    return _equal_bits(a, b, np.fmin(a, b), np.bitwise_or)


def _equal_bits(a: Array, b: Array, picked: Array, combine: Any) -> Array:
    """Equal numbers differ at most in the sign of a zero: AND gives the positive one, OR the negative."""
    unsigned = _UNSIGNED[a.dtype.itemsize]
    zeros: Array = combine(a.view(unsigned), b.view(unsigned)).view(a.dtype)
    return np.where(a == b, zeros, picked)


def median(a: Array, b: Array, c: Array) -> Array:
    """v_med3: with a NaN among them, the smallest number."""
    middle = maximum(minimum(a, b), minimum(maximum(a, b), c))
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), minimum(minimum(a, b), c), middle)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once, from float64: a product of fp32 is exact there, the sum may in rare ties round twice."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(c.dtype)


def clamped(x: Array) -> Array:
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def from_bf16(word: Array) -> Array:
    return (word.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """fp32 to bf16 bits (uint16), nearest even."""
    word = x.astype(np.float32).view(np.uint32)
    rounded = (word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def half_towards_zero(x: Array) -> Array:
    """fp32 to fp16 bits, cut."""
    half = x.astype(np.float16)
    too_large = np.abs(half.astype(np.float32)) > np.abs(x)
    return (half.view(np.uint16) - too_large.astype(np.uint16)).astype(np.uint32)
