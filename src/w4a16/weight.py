"""QuantizedWeight: a 4-bit weight as plain integers, before any device layout.

Every checkpoint reader produces it and every layout packs it; w = (code - zero) * scale with code and zero in 0..15.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import BadInput, Unsupported, explain_mismatch

CODES_PER_WORD = 8
SYMMETRIC_ZERO = 8  # the zero point of a weight that stores none
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def pack_nibbles(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Integers 0..15 [..., K] to int32 words [..., K//8]: nibble i (bits 4i) of a word holds its value order[i]."""
    values = codes.to(torch.int32).unflatten(-1, (-1, CODES_PER_WORD))
    words = torch.zeros(values.shape[:-1], dtype=torch.int32, device=codes.device)
    for nibble, index in enumerate(order):
        words |= values[..., index] << (4 * nibble)
    return words


def unpack_nibbles(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Inverse of `pack_nibbles`: int32 words [..., K//8] to uint8 codes [..., K]."""
    if words.stride(-1) != 1:  # one word a row counts as contiguous, whatever its stride
        words = words.clone(memory_format=torch.contiguous_format)
    pairs = words.view(torch.uint8)  # the low nibble of a byte comes first
    values = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(-2)
    if order == tuple(range(CODES_PER_WORD)):
        return values
    nibbles = values.unflatten(-1, (-1, CODES_PER_WORD))
    return torch.stack([nibbles[..., order.index(index)] for index in range(CODES_PER_WORD)], dim=-1).flatten(-2)


def merge_nibbles(x: Tensor, y: Tensor, low: Tensor, high: Tensor) -> None:
    """Bytes of two nibbles each: puts the low nibbles of x and y into `low`, x's below y's, the others into `high`."""
    torch.add(x & 0xF, y, alpha=16, out=low)  # modulo 256
    torch.bitwise_or(x >> 4, y & 0xF0, out=high)


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A linear weight [N, K], or E experts of one [E, N, K], in 4-bit integers.

    codes   int32 [..., N, K//8], eight sequential nibbles a word, K contiguous
    scales  [..., N, K//group], floating point, finite and non-zero, in the checkpoint's own dtype
    zeros   uint8 [..., N, K//group] with values 0..15, or None: then every zero point is 8 (symmetric)
    group   columns that share one scale; K for channel-wise
    perm    int64 [..., K] or None (act-order): column j of the codes multiplies input channel perm[j]

    Raises BadInput when a field has the wrong dtype or shape, or a value no reader may let through.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int
    perm: Tensor | None = None

    def __post_init__(self) -> None:
        _want("codes dtype", self.codes.dtype, torch.int32)
        if self.codes.ndim not in (2, 3) or 0 in self.codes.shape:
            raise BadInput(_message("codes shape", tuple(self.codes.shape), "[N, K//8] or [E, N, K//8], not empty"))
        lead, n, k = self.codes.shape[:-2], self.n, self.k
        if self.group <= 0 or k % self.group:
            raise BadInput(_message("group size", self.group, f"a positive divisor of K={k}"))
        grid = (*lead, n, k // self.group)
        if self.scales.dtype not in FLOATS:
            raise BadInput(_message("scales dtype", self.scales.dtype, "bfloat16, float16 or float32"))
        _want("scales shape", tuple(self.scales.shape), grid)
        if self.zeros is not None:
            _want("zeros dtype", self.zeros.dtype, torch.uint8)
            _want("zeros shape", tuple(self.zeros.shape), grid)
        if self.perm is not None:
            _want("perm dtype", self.perm.dtype, torch.int64)
            _want("perm shape", tuple(self.perm.shape), (*lead, k))

    @property
    def n(self) -> int:
        return self.codes.shape[-2]

    @property
    def k(self) -> int:
        return self.codes.shape[-1] * CODES_PER_WORD

    @property
    def experts(self) -> int:
        """Number of experts, 0 for a plain linear weight."""
        return self.codes.shape[0] if self.codes.ndim == 3 else 0

    @property
    def has_zeros(self) -> bool:
        return self.zeros is not None

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same record with every tensor on `device`."""
        if self.codes.device == torch.device(device):
            return self

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=moved(self.zeros),
            perm=moved(self.perm),
        )

    def check_values(self) -> QuantizedWeight:
        """Reads every scale, zero point and index once; raises BadInput at a value that would poison the output."""
        if not torch.isfinite(self.scales).all():
            raise BadInput(_message("scales", "NaN or infinity", "finite numbers"))
        if (self.scales == 0).any():
            raise BadInput(_message("scales", "a zero", "non-zero numbers"))
        if self.zeros is not None and (self.zeros > 15).any():
            raise BadInput(_message("zeros", int(self.zeros.max()), "0 to 15"))
        if self.perm is not None:
            identity = torch.arange(self.k, device=self.perm.device).expand_as(self.perm)
            if not torch.equal(self.perm.sort(dim=-1).values, identity):
                raise BadInput(_message("perm", "repeated or missing columns", f"a permutation of 0..{self.k - 1}"))
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [..., N, K], columns in the order of the input channels.

        (code - zero) * scale is exact in fp32 for 16-bit scales; it is rounded once to `dtype` (default: the scales').
        """
        levels = unpack_nibbles(self.codes).to(torch.float32).unflatten(-1, (-1, self.group))
        zeros = SYMMETRIC_ZERO if self.zeros is None else self.zeros.to(torch.float32).unsqueeze(-1)
        dense: Tensor = ((levels - zeros) * self.scales.to(torch.float32).unsqueeze(-1)).flatten(-2)
        if self.perm is not None:
            columns = self.perm.argsort(dim=-1).unsqueeze(-2).expand(dense.shape)
            dense = dense.gather(-1, columns)
        return dense.to(dtype or self.scales.dtype)

    def shard(self, dim: int, rank: int, world: int, *, parts: int = 1) -> QuantizedWeight:
        """The part of `rank` among `world` tensor-parallel ranks.

        dim 0 splits N (column parallel), dim 1 splits K (row parallel) on group boundaries; a channel-wise weight
        (group = K) splits inside its group, as each shard keeps the whole row's scale. `parts` splits each of that
        many equal blocks of N on its own, as a fused gate and up projection needs (parts=2).
        Raises Unsupported with a sentence when the split is uneven.
        """
        if dim not in (0, 1) or world < 1 or not 0 <= rank < world:
            raise BadInput(_message("shard", (dim, rank, world), "dim 0 or 1 and 0 <= rank < world"))
        if dim == 0:
            return self._shard_rows(rank, world, parts)
        return self._shard_columns(rank, world)

    def _shard_rows(self, rank: int, world: int, parts: int) -> QuantizedWeight:
        if self.n % (world * parts):
            raise Unsupported(f"N={self.n} does not split into {parts} x {world} equal row shards. Use fewer ranks.")
        size = self.n // (world * parts)

        def rows(t: Tensor) -> Tensor:
            cut: Tensor = t.unflatten(-2, (parts, world * size)).narrow(-2, rank * size, size)
            return cut.flatten(-3, -2).contiguous()

        zeros = None if self.zeros is None else rows(self.zeros)
        return replace(self, codes=rows(self.codes), scales=rows(self.scales), zeros=zeros)

    def _shard_columns(self, rank: int, world: int) -> QuantizedWeight:
        if self.perm is not None:
            raise Unsupported(
                "an act-order weight does not split along K: its columns of one group lie all over the input. "
                "Split it along N, or quantise without desc_act."
            )
        step = CODES_PER_WORD if self.group == self.k else self.group
        if self.k % (world * step):
            raise Unsupported(
                f"K={self.k} does not split into {world} shards on boundaries of {step} columns. Use fewer ranks."
            )
        size = self.k // world

        def columns(t: Tensor, per: int) -> Tensor:
            return t.narrow(-1, rank * size // per, size // per).contiguous()

        codes = columns(self.codes, CODES_PER_WORD)
        if self.group == self.k:
            return replace(self, codes=codes, group=size)
        zeros = None if self.zeros is None else columns(self.zeros, self.group)
        return replace(self, codes=codes, scales=columns(self.scales, self.group), zeros=zeros)


def stack_experts(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Joins the plain weights of E experts, equal in shape and kind, along a new leading axis."""
    return _join(weights, torch.stack)


def concat_rows(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Joins weights that read the same input along N (gate above up). Their act-order permutations must be equal."""
    first, *others = (w.perm for w in weights)
    same = all(p is None if first is None else p is not None and torch.equal(p, first) for p in others)
    if not same:
        raise Unsupported("weights with different act-order permutations cannot share one row-fused weight.")
    joined = _join(
        [w if w.perm is None else replace(w, perm=None) for w in weights], lambda tensors: torch.cat(tensors, dim=-2)
    )
    return replace(joined, perm=first)


def _join(weights: list[QuantizedWeight], join: Callable[[list[Tensor]], Tensor]) -> QuantizedWeight:
    first = weights[0]
    for w in weights[1:]:
        if (w.k, w.group, w.has_zeros, w.perm is None) != (first.k, first.group, first.has_zeros, first.perm is None):
            raise BadInput(_message("weights to join", "unequal K, group, zero points or act-order", "equal ones"))

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        return join(present) if present else None

    return replace(
        first,
        codes=join([w.codes for w in weights]),
        scales=join([w.scales for w in weights]),
        zeros=joined([w.zeros for w in weights]),
        perm=joined([w.perm for w in weights]),
    )


def _want(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise BadInput(_message(what, got, wanted))


def _message(what: str, got: object, wanted: object) -> str:
    return explain_mismatch(f"QuantizedWeight {what}", got=got, wanted=wanted, then="Check the reader that built it.")
