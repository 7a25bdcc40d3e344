"""Packed weight layouts as data. Readers produce plain integers; only this module shuffles them.

EXLLAMA is [N, K//8] int32 whose nibble i holds value EXLLAMA_ORDER[i] of its word, so that
(word >> 4p) & 0x000F000F is the adjacent pair (2p, 2p+1) as two 16-bit lanes. Source: the ExLlama kernels.

INT4PACK is what torch's `_weight_int4pack_mm_for_cpu` reads: codes uint8 [N, K//2] in blocks of rows that depend on the
CPU, scales [K//group, N, 2] with (scale, (8 - zero) * scale), and beside them the exact zeros uint8 [N, K//group].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import Unsupported
from .weight import CODES_PER_WORD, SYMMETRIC_ZERO, QuantizedWeight, pack_nibbles, unpack_nibbles

BLOCK_WORDS = 1 << 16  # words worked on at a time: temporaries that stay in a cache

EXLLAMA = "EXLLAMA"
INT4PACK = "INT4PACK"
INT4PACK_ROWS = 64  # N is padded to this: whole blocks on every CPU
EXLLAMA_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight in the layout of one device's kernels: the one resident copy.

    codes, scales, zeros  tensors whose meaning the layout defines; zeros None when symmetric
    perm                  int64 [..., K] or None (act-order): column j multiplies input channel perm[j]
    n, k, group           of the weight as the checkpoint has it
    The activation dtype is the scales'.
    """

    layout: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    n: int
    k: int
    group: int

    @property
    def act(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def has_zeros(self) -> bool:
        return self.zeros is not None

    @property
    def experts(self) -> int:
        """Number of experts, 0 for a plain linear weight."""
        return self.codes.shape[0] if self.codes.ndim == 3 else 0

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.perm)
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same record with every tensor on `device`."""
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            perm=None if self.perm is None else self.perm.to(device),
        )

    def expert(self, index: int) -> PackedWeight:
        """One expert's weight, as a view."""
        return replace(
            self,
            codes=self.codes[index],
            scales=self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
            perm=None if self.perm is None else self.perm[index],
        )


def reorder_words(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """Words of sequential nibbles to words whose nibble i holds value order[i]; int32 in, int32 out, same shape."""
    out = torch.empty(words.shape, dtype=torch.int32, device=words.device)
    flat, into = words.reshape(-1, words.shape[-1]), out.view(-1, words.shape[-1])
    step = max(1, BLOCK_WORDS // words.shape[-1])
    for start in range(0, len(flat), step):
        block, target = flat[start : start + step], into[start : start + step].zero_()
        for nibble, index in enumerate(order):
            target |= ((block >> (4 * index)) & 0xF) << (4 * nibble)
    return out


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(CODES_PER_WORD))


def _pack_exllama(weight: QuantizedWeight, act: torch.dtype) -> tuple[Tensor, Tensor]:
    return reorder_words(weight.codes, EXLLAMA_ORDER), weight.scales.to(act).contiguous()


def _unpack_exllama(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    return reorder_words(packed.codes, inverse(EXLLAMA_ORDER)), packed.scales


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


def _pack_int4pack(weight: QuantizedWeight, act: torch.dtype) -> tuple[Tensor, Tensor]:
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
    return codes, both.transpose(-3, -2).to(act).contiguous()


def _unpack_int4pack(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    rows = int4pack_rows()
    half = rows.shape[1]
    columns = packed.codes.unflatten(-2, (-1, 2 * half)).flatten(-2).unflatten(-1, (packed.k, half))
    codes = torch.empty((*columns.shape[:-1], 2 * half), dtype=torch.uint8)
    codes[..., rows[0]], codes[..., rows[1]] = columns & 15, columns >> 4
    codes = codes.transpose(-1, -2).flatten(-3, -2)[..., : packed.n, :]
    scales = packed.scales[..., :: packed.group // int4pack_group(packed.group), : packed.n, 0]
    return pack_nibbles(codes), scales.transpose(-1, -2).contiguous()


_PACK = {EXLLAMA: _pack_exllama, INT4PACK: _pack_int4pack}
_UNPACK = {EXLLAMA: _unpack_exllama, INT4PACK: _unpack_int4pack}


def pack(weight: QuantizedWeight, *, layout: str = EXLLAMA, act: torch.dtype | None = None) -> PackedWeight:
    """`weight` in `layout`, its scales in `act` (the dtype of the activations; default the scales' own)."""
    if layout not in _PACK:
        raise Unsupported(f"layout {layout!r} is unknown; w4a16 has {', '.join(_PACK)}.")
    codes, scales = _PACK[layout](weight, act or weight.scales.dtype)
    return PackedWeight(
        layout=layout,
        codes=codes,
        scales=scales,
        zeros=None if weight.zeros is None else weight.zeros.contiguous(),
        perm=weight.perm,
        n=weight.n,
        k=weight.k,
        group=weight.group,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """The plain weight that `pack` was given, its scales in the activation dtype."""
    codes, scales = _UNPACK[packed.layout](packed)
    return QuantizedWeight(codes=codes, scales=scales, zeros=packed.zeros, group=packed.group, perm=packed.perm)
