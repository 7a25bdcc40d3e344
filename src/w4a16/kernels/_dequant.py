"""Jit helpers: words of eight codes to 16-bit floats, in every form that a tuning row may name.

w = (code - zero) * scale. The forms differ in what the hardware executes, and some in rounding:

float_subtract  code and zero to float, subtract, multiply (the source before its #953). The multiply rounds.
int_subtract    subtract as integers, then to float, multiply. The same bits.
int_truncate    bf16: as int_subtract, but the product is cut to 16 bits: 1 ulp instead of 1/2, towards zero.
magic           two codes an instruction, as floats MAGIC + code; subtract MAGIC + zero, multiply. The same bits.
carrier         fp16: (1024 + code - 1024) * scale + bias in one FMA, bias = -zero * scale rounded to fp16. Not the same
                bits: the bias carries its own rounding, up to 1/2 ulp of zero * scale, into every weight of the group.
group_scale     code - zero, exact; the scale multiplies the fp32 sum over the group. More exact than all above.
group_sum       MAGIC + code, exact; with S the sum of x over the group, its fp32 sum loses (MAGIC + zero) * S and then
                meets the scale: no arithmetic on weights at all. The offset cancels in fp32, so that
                |MAGIC * S| * 2^-24 is left as an absolute error of a group's sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..compat import INTERPRETED, difference, narrowed, product


@triton.jit
def magic_value(DTYPE: tl.constexpr):
    """What MAGIC stands for: 1024 in fp16, 128 in bf16."""
    return 1024.0 if DTYPE.is_fp16() else 128.0


@triton.jit
def codes_as_int(words):
    """int32 codes [N, K] of words [N, K//8]: each word eight times, then shifted by its own amount."""
    N: tl.constexpr = words.shape[0]
    K: tl.constexpr = words.shape[1] * 8
    words = tl.interleave(words, words)
    words = tl.interleave(words, words)
    words = tl.interleave(words, words)
    value = tl.arange(0, K) % 8
    shift = value // 2 * 4 + value % 2 * 16
    return (tl.reshape(words, (N, K)) >> shift[None, :]) & 0xF


@triton.jit
def _masked(words, DTYPE: tl.constexpr, PINNED: tl.constexpr):
    """Two codes of each word, those in the low nibbles of its halves, as two floats MAGIC + code."""
    MAGIC: tl.constexpr = 0x64006400 if DTYPE.is_fp16() else 0x43004300
    if PINNED and not INTERPRETED:
        # An impure instruction cannot be repeated in the layout of the matrix operand, where both halves of a wave and
        # every warp along M would unpack the same weight: it happens once, before LDS.
        ASM: tl.constexpr = "v_and_or_b32 $0, $1, $2, " + ("0x64006400" if DTYPE.is_fp16() else "0x43004300")
        pair = tl.inline_asm_elementwise(ASM, "=v,v,v", [words, 0x000F000F], tl.int32, is_pure=False, pack=1)
    else:
        pair = (words & 0x000F000F) | MAGIC
    return pair


@triton.jit
def _magic_pairs(words, DTYPE: tl.constexpr, PINNED: tl.constexpr):
    """int32 [N, K//8, 2, 2] of words [N, K//8]: adjacent codes as pairs of 16-bit floats MAGIC + code."""
    p0 = _masked(words, DTYPE, PINNED)
    p1 = _masked(words >> 4, DTYPE, PINNED)
    p2 = _masked(words >> 8, DTYPE, PINNED)
    p3 = _masked(words >> 12, DTYPE, PINNED)
    return tl.join(tl.join(p0, p2), tl.join(p1, p3))


@triton.jit
def _split(pairs, DTYPE: tl.constexpr):
    """Floats [N, K] of int32 pairs [N, K//8, 2, 2]."""
    N: tl.constexpr = pairs.shape[0]
    K: tl.constexpr = pairs.shape[1] * 8
    low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (N, K))


@triton.jit
def _twice(bits):
    """int32 [N, 1, 1, 1] of 16-bit patterns [N]: each in both halves."""
    return (bits | (bits << 16))[:, None, None, None]


@triton.jit
def _packed_fp16(words, scale, zero):
    """Form magic on AMD: Triton 3.6 leaves half of these additions and products unpacked."""
    pairs = _magic_pairs(words, tl.float16, True)
    offset = _twice(zero | 0xE400)  # -(1024 + zero)
    pairs = tl.inline_asm_elementwise("v_pk_add_f16 $0, $1, $2", "=v,v,v", [pairs, offset], tl.int32, False, 1)
    scales = _twice(scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    pairs = tl.inline_asm_elementwise("v_pk_mul_f16 $0, $1, $2", "=v,v,v", [pairs, scales], tl.int32, False, 1)
    return _split(pairs, tl.float16)


@triton.jit
def magic_codes(words, DTYPE: tl.constexpr, PINNED: tl.constexpr):
    """MAGIC + code as floats [N, K] of words [N, K//8]: a mask and an OR give two of them."""
    return _split(_magic_pairs(words, DTYPE, PINNED), DTYPE)


@triton.jit
def magic_levels(words, zero, DTYPE: tl.constexpr, PINNED: tl.constexpr):
    """code - zero [N, K], exact, as the difference of two floats MAGIC + integer."""
    MAGIC: tl.constexpr = 0x6400 if DTYPE.is_fp16() else 0x4300
    shifted = (zero | MAGIC).to(tl.int16).to(DTYPE, bitcast=True)
    return difference(magic_codes(words, DTYPE, PINNED), shifted[:, None])


@triton.jit
def dequantized(words, scale, zero, FORM: tl.constexpr, PINNED: tl.constexpr = False):
    """Weights [N, K] in the scale's dtype, of words int32 [N, K//8], scale [N] and zero int32 [N].

    The group forms leave the scale (group_sum: and the zero point) to the sum.
    """
    DTYPE: tl.constexpr = scale.dtype
    if FORM == "group_sum":
        return magic_codes(words, DTYPE, PINNED)
    if FORM == "group_scale":
        return magic_levels(words, zero, DTYPE, PINNED)
    if FORM == "magic" and PINNED and DTYPE.is_fp16() and not INTERPRETED:
        return _packed_fp16(words, scale, zero)
    if FORM == "magic":
        return product(magic_levels(words, zero, DTYPE, PINNED), scale[:, None])
    if FORM == "carrier":
        levels = magic_levels(words, tl.zeros_like(zero), DTYPE, PINNED)
        bias = (-zero.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
        return tl.fma(
            levels, tl.broadcast_to(scale[:, None], levels.shape), tl.broadcast_to(bias[:, None], levels.shape)
        )
    codes = codes_as_int(words)
    if FORM == "float_subtract":
        return product(difference(narrowed(codes, DTYPE), narrowed(zero, DTYPE)[:, None]), scale[:, None])
    levels = codes - zero[:, None]
    if FORM == "int_truncate":
        exact = levels.to(tl.float32) * scale.to(tl.float32)[:, None]
        return (exact.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return product(narrowed(levels, DTYPE), scale[:, None])
