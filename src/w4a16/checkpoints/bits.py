"""Moves 4-bit codes between the ways that checkpoints pack them, word by word.

A word holds eight codes; unpacked, a layer would take eight times its memory, so nothing here unpacks a whole one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..weight import pack_nibbles, unpack_nibbles
from .shards import memory

BLOCK_BYTES = 1 << 20  # temporaries of about this size stay in the last cache of a CPU
GPU_BLOCK_BYTES = 1 << 27  # and on a GPU, where launches count
# swap the halves of 8x8 blocks of nibbles, then the quarters, then the eighths
BUTTERFLY = ((4, 0x0000FFFF, 16), (2, 0x00FF00FF, 8), (1, 0x0F0F0F0F, 4))


def empty(*shape: int, device: torch.device) -> Tensor:
    """int32; on the CPU, in memory that goes back to the system when freed."""
    if 0 in shape or device.type != "cpu":
        return torch.empty(shape, dtype=torch.int32, device=device)
    return torch.frombuffer(memory(4 * math.prod(shape)), dtype=torch.int32).view(shape)


def transpose_nibbles(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 [8R, C] to [8C, R]: nibble j of out[8c + i, r] is nibble order[i] of words[8r + j, c]."""
    rows, columns = words.shape
    out = empty(columns, 8, rows // 8, device=words.device)
    out.copy_(words.view(rows // 8, 8, columns).permute(2, 1, 0))
    step = max(1, _block_bytes(words) // max(1, out[:1].nbytes))
    for start in range(0, len(out), step):
        block = out[start : start + step]
        for half, mask, shift in BUTTERFLY:
            upper, lower = block.view(len(block), -1, 2, half, block.shape[-1]).unbind(2)
            swap = ((upper >> shift) ^ lower) & mask
            lower ^= swap
            upper ^= swap << shift
        if order != tuple(range(8)):
            block.copy_(block[:, order])
    return out.view(8 * columns, rows // 8)


def transpose(words: Tensor) -> Tensor:
    """int32 [R, C] to [C, R], contiguous."""
    out = empty(words.shape[1], words.shape[0], device=words.device)
    return out.copy_(words.t())


def take_columns(codes: Tensor, index: Tensor) -> Tensor:
    """Codes [N, K//8] whose column j is column index[j] of `codes`."""
    out = empty(*codes.shape, device=codes.device)
    step = max(1, _block_bytes(codes) // max(1, 8 * codes[:1].nbytes))
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        out[rows] = pack_nibbles(unpack_nibbles(codes[rows]).index_select(1, index))
    return out


def _block_bytes(words: Tensor) -> int:
    return BLOCK_BYTES if words.device.type == "cpu" else GPU_BLOCK_BYTES


def invert(perm: Tensor) -> Tensor:
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(len(perm), dtype=perm.dtype, device=perm.device)
    return inverse
