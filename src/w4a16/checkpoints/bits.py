"""Moves 4-bit codes between the ways that checkpoints pack them, word by word.

A word holds eight codes; unpacked, a layer would take eight times its memory, so nothing here unpacks a whole one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..weight import pack_nibbles, unpack_nibbles

BLOCK_BYTES = 1 << 20  # temporaries of about this size stay in the last cache
# swap the halves of 8x8 blocks of nibbles, then the quarters, then the eighths
BUTTERFLY = ((4, 0x0000FFFF, 16), (2, 0x00FF00FF, 8), (1, 0x0F0F0F0F, 4))


def transpose_nibbles(words: Tensor) -> Tensor:
    """int32 [8R, C] to [8C, R]: nibble j of out[8c + i, r] is nibble i of words[8r + j, c]. Its own inverse."""
    turned = words.view(-1, 8, words.shape[1]).permute(2, 1, 0)
    out = turned.clone(memory_format=torch.contiguous_format)  # [C, 8, R]; worked on in place, so never the input
    step = max(1, BLOCK_BYTES // max(1, out[:1].nbytes))
    for start in range(0, len(out), step):
        block = out[start : start + step]
        for half, mask, shift in BUTTERFLY:
            upper, lower = block.view(len(block), -1, 2, half, block.shape[-1]).unbind(2)
            swap = ((upper >> shift) ^ lower) & mask
            lower ^= swap
            upper ^= swap << shift
    return out.view(-1, out.shape[-1])


def take_columns(codes: Tensor, index: Tensor) -> Tensor:
    """Codes [N, K//8] whose column j is column index[j] of `codes`."""
    out = torch.empty_like(codes)
    step = max(1, BLOCK_BYTES // max(1, 8 * codes[:1].nbytes))
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        out[rows] = pack_nibbles(unpack_nibbles(codes[rows]).index_select(1, index))
    return out


def invert(perm: Tensor) -> Tensor:
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(len(perm), dtype=perm.dtype, device=perm.device)
    return inverse
