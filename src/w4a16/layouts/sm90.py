"""SM90: tiles of 64 rows x 64 columns, each thread's operand of Hopper's matrix instructions in one 16-byte piece.

codes   int32 [ceil(N/64), ceil(K/64) * 512]: a tile is 2 KiB. Thread t of a warpgroup owns its bytes [16t, 16t + 16):
        one word for each step of 16 columns. With t = 32 w + 4 r + c, word j holds the codes of rows 16 w + 8 a + r and
        columns 16 j + 8 b + 2 c + d at bit 4 (2 b + a) + 16 d, so that (word >> 4 i) & 0x000F000F is register i of the
        first operand of wgmma m64k16 and of mma m16n8k16, as two 16-bit lanes.
scales  [groups, ceil(N/64) * 64] in the activation dtype; of every 16 rows, row 8 a + r stands at 2 r + a, so that a
        thread reads both of its rows at once
zeros   uint8 [groups, ceil(N/64) * 64], rows as in scales, or None

Rows and columns past N and K are zero codes under zero scales. groups is K/G, with as many more as the last tile of
columns needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import Unsupported
from ..weight import CODES_PER_WORD, QuantizedWeight, merge_nibbles, pack_nibbles, unpack_nibbles
from .packed import PackedWeight

SM90 = "SM90"
TILE = 64  # rows, and columns, of a tile
TILE_WORDS = TILE * TILE // CODES_PER_WORD
BLOCK_TILES = 1 << 16  # tiles packed at a time: temporaries of 200 MB, a layer of 8B


def sm90_group(group: int, k: int) -> str | None:
    """Why a weight of this group size cannot be packed, or None."""
    if group == 32 or group % TILE == 0 or (group == k and group % 16 == 0):
        return None
    return f"group must be 32, a multiple of {TILE} or all of K (and that a multiple of 16), not {group}"


def sm90_groups(group: int, k: int) -> int:
    """Rows of scales: the groups that whole tiles of columns take."""
    return 1 if group == k else -(-k // TILE) * TILE // group


def pack_sm90(weight: QuantizedWeight, act: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    n, k = weight.n, weight.k
    why = sm90_group(weight.group, k)
    if why:
        raise Unsupported(f"layout {SM90}: {why}.")
    lead = weight.codes.shape[:-2]
    rows, columns = -(-n // TILE), -(-k // TILE)
    codes = weight.codes.new_empty((*lead, rows, columns * TILE_WORDS))
    step = max(1, BLOCK_TILES // columns)
    high = n if n % TILE else n * lead.numel()  # rows of whole tiles are one weight's as well as several experts'
    stacks = zip(weight.codes.view(-1, high, k // 8), codes.view(-1, -(-high // TILE), codes.shape[-1]), strict=True)
    for plain, packed in () if codes.is_meta else stacks:
        for start in range(0, len(packed), step):
            block, tiles = plain[start * TILE : (start + step) * TILE], packed[start : start + step]
            _tile(_padded(block, columns * TILE // CODES_PER_WORD, len(tiles) * TILE), tiles)
    groups = sm90_groups(weight.group, k)
    scales = _rows_paired(_padded(weight.scales.to(act), groups, rows * TILE))
    zeros = None if weight.zeros is None else _rows_paired(_padded(weight.zeros, groups, rows * TILE))
    return codes, scales, zeros


def rows_sm90(packed: PackedWeight, first: int, n: int) -> PackedWeight:
    """So many rows of a linear layer's weight from `first` on, the first of a tile, in the same memory."""
    last = first - (-n // TILE) * TILE
    zeros = None if packed.zeros is None else packed.zeros[:, first:last]
    codes, scales = packed.codes[first // TILE : last // TILE], packed.scales[:, first:last]
    return replace(packed, codes=codes, scales=scales, zeros=zeros, n=n)


def split_sm90(packed: PackedWeight, rows: Sequence[int]) -> list[PackedWeight]:
    """Weights of so many rows each, all of whole tiles, in memory of their own."""

    def own(grid: Tensor) -> Tensor:
        return grid.clone(memory_format=torch.contiguous_format)

    parts = [rows_sm90(packed, last - n, n) for n, last in zip(rows, itertools.accumulate(rows), strict=True)]
    return [
        replace(
            part, codes=own(part.codes), scales=own(part.scales), zeros=None if part.zeros is None else own(part.zeros)
        )
        for part in parts
    ]


def unpack_sm90(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    n, k = packed.n, packed.k
    lead, rows = packed.codes.shape[:-2], packed.codes.shape[-2]
    words = packed.codes.view(-1, rows, packed.codes.shape[-1])
    codes = torch.stack([_untiled(block)[:n, :k] for block in words]).view(*lead, n, k)
    groups = k // packed.group
    scales = _rows_in_order(packed.scales)[..., :n, :groups].contiguous()
    zeros = None if packed.zeros is None else _rows_in_order(packed.zeros)[..., :n, :groups].contiguous()
    return pack_nibbles(codes), scales, zeros


def _padded(grid: Tensor, columns: int, rows: int) -> Tensor:
    if grid.shape[-2:] == (rows, columns):
        return grid
    return torch.nn.functional.pad(grid, (0, columns - grid.shape[-1], 0, rows - grid.shape[-2]))


def _tile(words: Tensor, tiles: Tensor) -> None:
    """int32 [R, C/8] of whole tiles -> int32 [R/64, C/64 * 512]."""
    columns = words.shape[1] * CODES_PER_WORD // TILE
    parts = words.contiguous().view(torch.uint8).view(-1, 4, 2, 8, columns, 4, 2, 4)  # R w a r C j b c, nibble d
    into = tiles.view(torch.uint8).view(-1, columns, 4, 8, 4, 4, 2, 2)  # R C w r c j d b, nibble a
    merge_nibbles(*parts.permute(0, 4, 1, 3, 7, 5, 6, 2).unbind(-1), *into.unbind(-2))


def _untiled(words: Tensor) -> Tensor:
    """int32 [R/64, C/64 * 512] -> uint8 [R, C]."""
    parts = unpack_nibbles(words).view(len(words), -1, 4, 8, 4, 4, 2, 2, 2)  # R C w r c j, d b a
    return parts.permute(0, 2, 8, 3, 1, 5, 7, 4, 6).reshape(len(words) * TILE, -1)


def _rows_paired(grid: Tensor) -> Tensor:
    """[..., N, groups] -> [..., groups, N] with rows r and r + 8 of every 16 side by side."""
    *lead, n, groups = grid.shape
    return grid.reshape(-1, n // 16, 2, 8, groups).permute(0, 4, 1, 3, 2).reshape(*lead, groups, n)


def _rows_in_order(grid: Tensor) -> Tensor:
    """The inverse of `_rows_paired`."""
    ordered: Tensor = grid.transpose(-1, -2).unflatten(-2, (-1, 8, 2)).transpose(-3, -2).flatten(-4, -2)
    return ordered
