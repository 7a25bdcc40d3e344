"""INT4PACK: what torch's `_weight_int4pack_mm_for_cpu` reads.

codes uint8 [N, K//2] in blocks of rows that depend on the CPU, scales [K//group, N, 2] with
(scale, (8 - zero) * scale), and beside them the exact zeros uint8 [N, K//group].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import Unsupported
from ..weight import SYMMETRIC_ZERO, QuantizedWeight, pack_nibbles, unpack_nibbles
from .exllama import BLOCK_WORDS, EXLLAMA
from .packed import PackedWeight

INT4PACK = "INT4PACK"
INT4PACK_ROWS = 64  # N is padded to this: whole blocks on every CPU


def int4pack_group(group: int) -> int:
    """The largest group that torch's kernel takes and that divides `group`: a wider one repeats its scales. 0: none."""
    return next((size for size in (256, 128, 64, 32) if group % size == 0), 0)


@functools.cache
def int4pack_rows() -> Tensor:
    """[2, B/2]: the row, within a block of B, of the low and the high nibble of each byte of a column.

    torch lays rows out by the vectors of this CPU; which way, its packing of the row numbers themselves tells.
    """
    row = torch.arange(INT4PACK_ROWS, dtype=torch.int32)[:, None].expand(-1, 32).contiguous()
    low, high = (torch._convert_weight_to_int4pack_for_cpu(half, 1).flatten().int() for half in (row & 15, row >> 4))
    rows = torch.stack([(low & 15) | (high & 15) << 4, (low >> 4) | (high >> 4) << 4])
    again = (rows[0] == rows[0, 0]).nonzero().flatten()  # the first byte's row, in the next column
    return rows[:, : int(again[1])].long()


def pack_int4pack(weight: QuantizedWeight, act: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    group = int4pack_group(weight.group)
    if not group:
        raise Unsupported(f"layout {INT4PACK} needs a group that 32 divides, not {weight.group}. Pack as {EXLLAMA}.")
    lead, n, k = weight.codes.shape[:-2], weight.n, weight.k
    padded = -(-n // INT4PACK_ROWS) * INT4PACK_ROWS
    codes = torch.empty((*lead, padded, k // 2), dtype=torch.uint8)
    step = max(1, BLOCK_WORDS // k) * INT4PACK_ROWS
    for words, target in zip(weight.codes.view(-1, n, k // 8), codes.view(-1, padded, k // 2), strict=True):
        for start in range(0, padded, step):
            rows = unpack_nibbles(words[start : start + step]).int()
            rows = torch.nn.functional.pad(rows, (0, 0, 0, min(step, padded - start) - len(rows)))
            target[start : start + step] = torch._convert_weight_to_int4pack_for_cpu(rows, 1)
    scales = weight.scales.to(act).float()
    zeros = SYMMETRIC_ZERO if weight.zeros is None else weight.zeros.float()
    # torch's form: w = (q - 8) * scale + shift
    both = torch.stack([scales, (8 - zeros) * scales], dim=-1).repeat_interleave(weight.group // group, dim=-2)
    both = torch.nn.functional.pad(both, (0, 0, 0, 0, 0, padded - n))
    exact = None if weight.zeros is None else weight.zeros.contiguous()
    return codes, both.transpose(-3, -2).to(act).contiguous(), exact


def unpack_int4pack(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = int4pack_rows()
    half = rows.shape[1]
    columns = packed.codes.unflatten(-2, (-1, 2 * half)).flatten(-2).unflatten(-1, (packed.k, half))
    codes = torch.empty((*columns.shape[:-1], 2 * half), dtype=torch.uint8)
    codes[..., rows[0]], codes[..., rows[1]] = columns & 15, columns >> 4
    codes = codes.transpose(-1, -2).flatten(-3, -2)[..., : packed.n, :]
    scales = packed.scales[..., :: packed.group // int4pack_group(packed.group), : packed.n, 0]
    return pack_nibbles(codes), scales.transpose(-1, -2).contiguous(), packed.zeros
