"""Every difference between Triton versions, and between its compilers and its interpreter, that a kernel would meet.

The interpreters of 3.6, 3.7, 3.8 and 3.9 keep bf16 as 16-bit integers: they add, multiply and `tl.dot` bit patterns,
cast integers to bf16 as bits, and truncate where the hardware rounds fp32 to it, all without an error. There, and only
there, these helpers go through fp32; compiled, each is the one operation it names.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, 16-bit operands, fp32 sums."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """fp32 or integer `x` as DTYPE, rounded to nearest even."""
    if INTERPRETED and DTYPE.is_bf16():
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(a, b):
    """a * b, rounded to their 16-bit dtype."""
    if INTERPRETED:
        return narrowed(a.to(tl.float32) * b.to(tl.float32), a.dtype)
    return a * b


@triton.jit
def difference(a, b):
    """a - b, rounded to their 16-bit dtype."""
    if INTERPRETED:
        return narrowed(a.to(tl.float32) - b.to(tl.float32), a.dtype)
    return a - b
