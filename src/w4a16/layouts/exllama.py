"""EXLLAMA and SKINNY: nibbles in an order that yields pairs of 16-bit lanes.

Codes are [N, K//8] int32 whose nibble i holds value EXLLAMA_ORDER[i] of its word, so that
(word >> 4p) & 0x000F000F is the adjacent pair (2p, 2p+1) as two 16-bit lanes. Source: the ExLlama kernels.

EXLLAMA   read by CPU kernels: zeros uint8 [N, K//G]
SKINNY    read by GPU kernels: zeros int32 [ceil(N/8), K//G], row n in nibble n % 8 of word row n // 8; every tensor
          has a row stride of its own, which `pad_rows` moves off the strides that gfx11 memory is slow at
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..weight import CODES_PER_WORD, QuantizedWeight, pack_nibbles, unpack_nibbles
from .packed import PackedWeight

EXLLAMA = "EXLLAMA"
SKINNY = "SKINNY"
EXLLAMA_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BLOCK_WORDS = 1 << 16  # words worked on at a time: temporaries that stay in a CPU's cache
GPU_BLOCK_WORDS = 1 << 24  # and on a GPU, where launches count


def reorder_words(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """Words of sequential nibbles to words whose nibble i holds value order[i]; int32 in, int32 out, same shape."""
    out = torch.empty(words.shape, dtype=torch.int32, device=words.device)
    flat, into = words.reshape(-1, words.shape[-1]), out.view(-1, words.shape[-1])
    step = max(1, (BLOCK_WORDS if words.device.type == "cpu" else GPU_BLOCK_WORDS) // words.shape[-1])
    for start in range(0, len(flat), step):
        block, target = flat[start : start + step], into[start : start + step].zero_()
        for nibble, index in enumerate(order):
            target |= ((block >> (4 * index)) & 0xF) << (4 * nibble)
    return out


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(CODES_PER_WORD))


def pack_exllama(weight: QuantizedWeight, act: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    scales = weight.scales.to(act, copy=True).contiguous()  # a view would keep the memory of what was read alive
    return reorder_words(weight.codes, EXLLAMA_ORDER), scales, zeros


def unpack_exllama(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    return reorder_words(packed.codes, inverse(EXLLAMA_ORDER)), packed.scales, packed.zeros


def pack_skinny(weight: QuantizedWeight, act: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scales, zeros = pack_exllama(weight, act)
    if zeros is not None:
        rows = torch.nn.functional.pad(zeros, (0, 0, 0, -weight.n % CODES_PER_WORD))
        zeros = pack_nibbles(rows.transpose(-1, -2)).transpose(-1, -2).contiguous()
    return codes, scales, zeros


def unpack_skinny(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scales, zeros = unpack_exllama(packed)
    if zeros is not None:
        zeros = unpack_nibbles(zeros.transpose(-1, -2)).transpose(-1, -2)[..., : packed.n, :].contiguous()
    return codes, scales.contiguous(), zeros


def codes_stride_bytes(row: int) -> int:
    """The row stride of codes on gfx11 for rows of `row` bytes: whole 128-byte lines, never a multiple of 512.

    Rows 512 bytes apart fall on one memory channel (the gfx1151 "cliff"; source: the gfx11 branch of ROCm's vLLM).
    """
    if row % 512 == 0:
        return row + 256
    lines = -(-row // 128) * 128
    return lines + 128 if lines % 512 == 0 else lines


def scales_stride_bytes(row: int) -> int:
    """The row stride of scales, and of zeros, on gfx11: 128 bytes more where rows are a multiple of 512 bytes."""
    return row + 128 if row % 512 == 0 else row


def pad_rows(packed: PackedWeight) -> PackedWeight:
    """A SKINNY weight with the row strides gfx11 wants, each tensor its own: views of padded storage."""
    return replace(
        packed,
        codes=_strided(packed.codes, codes_stride_bytes),
        scales=_strided(packed.scales, scales_stride_bytes),
        zeros=None if packed.zeros is None else _strided(packed.zeros, scales_stride_bytes),
    )


def _strided(rows: Tensor, stride_bytes: Callable[[int], int]) -> Tensor:
    length, size = rows.shape[-1], rows.element_size()
    stride = stride_bytes(length * size) // size
    if stride == length:
        return rows
    return rows.new_empty((*rows.shape[:-1], stride))[..., :length].copy_(rows)
