"""What the three formats share: the scheme, the plan of one module, typed access to a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import BadCheckpoint, Unsupported, explain_mismatch
from ..weight import CODES_PER_WORD, SYMMETRIC_ZERO, QuantizedWeight
from .shards import Entry, Files, bad

CHANNEL = -1
Parts = Mapping[str, Entry]  # the companion tensors of one module by suffix
SEE_CONFIG = "Correct the configuration, or use the one that came with these files."


@dataclass(frozen=True)
class Scheme:
    """How a model is quantised. `group` is the number of columns that share a scale, -1 for a whole row (channel)."""

    group: int
    symmetric: bool
    act_order: bool = False


@dataclass(frozen=True)
class Plan:
    """One quantised module, as its headers and the configuration describe it."""

    n: int
    k: int
    group: int  # k for channel-wise
    scheme: Scheme

    @property
    def groups(self) -> int:
        return self.k // self.group


class Format(Protocol):
    """One checkpoint format. An instance is one model's parsed quantisation configuration."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]  # of every companion tensor; the codes first
    planned: ClassVar[tuple[str, ...]]  # those of them that `plan` reads, and `read` does not

    def __init__(self, fields: Fields) -> None: ...
    def required(self, module: str) -> tuple[str, ...]: ...
    def ignores(self, tensor: str) -> bool: ...
    def plan(self, module: str, parts: Parts, files: Files) -> Plan: ...
    def read(self, parts: Parts, plan: Plan) -> QuantizedWeight: ...
    @staticmethod
    def write(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]: ...
    @staticmethod
    def describe(scheme: Scheme, found: Mapping[Scheme, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]: ...


class Fields:
    """A JSON object of the configuration; each access states what it wants and says so when it is not there."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, *keys: str, kind: type | tuple[type, ...], wanted: str, default: Any = ...) -> Any:
        """The value of the first key that is there and not null."""
        key = next((key for key in keys if self.values.get(key) is not None), keys[0])
        value = self.values.get(key)
        if value is None and default is not ...:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:  # not isinstance: True is no number of bits
            got = "nothing" if value is None else repr(value)
            raise bad(f"{self.where}.{key}", got=got, wanted=wanted, then=SEE_CONFIG)
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.get(key, kind=bool, wanted="true or false", default=default))

    def text(self, *keys: str, default: str) -> str:
        return str(self.get(*keys, kind=str, wanted="a string", default=default))

    def four_bits(self, *keys: str) -> None:
        bits = self.get(*keys, kind=int, wanted="4")
        if bits != 4:
            raise self.unsupported(keys[0], got=bits, wanted="4", then="w4a16 holds 4-bit weights only.")

    def group(self, *keys: str) -> int:
        group = int(self.get(*keys, kind=int, wanted="a positive number, or -1 for one group a row"))
        if group != CHANNEL and group <= 0:
            raise bad(f"{self.where}.{keys[0]}", got=group, wanted="a positive number or -1", then=SEE_CONFIG)
        return group

    def child(self, key: str, value: object) -> Fields:
        if not isinstance(value, dict):
            raise bad(f"{self.where}.{key}", got=repr(value), wanted="a JSON object", then=SEE_CONFIG)
        return Fields(value, f"{self.where}.{key}")

    def pattern(self, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise bad(self.where, got=f"{text!r} ({error})", wanted="a regular expression", then=SEE_CONFIG) from None

    def unsupported(self, key: str, *, got: object, wanted: object, then: str) -> Unsupported:
        return Unsupported(explain_mismatch(f"{self.where}.{key}", got=got, wanted=wanted, then=then))


def plan_module(codes: Entry, n: int, k: int, scheme: Scheme) -> Plan:
    """The plan of a module [n, k]; raises when k does not divide into groups and words."""
    group = k if scheme.group == CHANNEL else scheme.group
    if k % group:
        raise codes.bad("group size", got=f"{group} for K={k}", wanted=f"a divisor of {k}", then=SEE_CONFIG)
    if k % CODES_PER_WORD:
        raise Unsupported(
            f"{codes.file}: {codes.name}: got K={k}, wanted a multiple of {CODES_PER_WORD}. Leave this layer dense."
        )
    return Plan(n, k, group, scheme)


def read_scales(entry: Entry) -> Tensor:
    """Scales as stored; a value that would poison the output is an error."""
    scales = entry.read()
    if entry.doubted((scales / scales).sum()):  # NaN of infinity and zero too
        raise poisoned(entry, scales)
    return scales


def poisoned(entry: Entry, scales: Tensor) -> BadCheckpoint:
    got = "a zero" if torch.isfinite(scales).all() else "NaN or infinity"
    return entry.bad("values", got=got, wanted="finite numbers other than zero", then="Quantise the model again.")


def drop_trivial(zeros: Tensor, scheme: Scheme) -> Tensor | None:
    """No zero points for a symmetric scheme that stores the symmetric one; any other stored value is believed."""
    return None if scheme.symmetric and bool((zeros == SYMMETRIC_ZERO).all()) else zeros


def zeros_of(weight: QuantizedWeight) -> Tensor:
    """Zero points [N, G], written out where the weight stores none."""
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8, device=weight.scales.device)


def read_order(entry: Entry, plan: Plan) -> Tensor | None:
    """Act-order: the permutation that sorts the columns by `g_idx`, or None when they are in order already."""
    g_idx = entry.read().long()
    trivial = torch.arange(plan.k, device=g_idx.device) // plan.group
    if torch.equal(g_idx, trivial) or bool((g_idx == -1).all()):  # -1: written by early versions for "no order"
        return None
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= plan.groups:
        raise entry.bad("values", got=low if low < 0 else high, wanted=f"groups 0 to {plan.groups - 1}")
    counts = g_idx.bincount(minlength=plan.groups)
    if (counts != plan.group).any():
        wrong = int((counts != plan.group).nonzero()[0])
        raise entry.bad("values", got=f"{int(counts[wrong])} columns in group {wrong}", wanted=plan.group)
    return g_idx.argsort(stable=True)


def order_of(weight: QuantizedWeight) -> Tensor:
    """`g_idx` [K] int32: the group of every input channel."""
    groups = torch.arange(weight.k, dtype=torch.int32, device=weight.codes.device) // weight.group
    if weight.perm is None:
        return groups
    g_idx = torch.empty_like(groups)
    g_idx[weight.perm] = groups
    return g_idx


def one_group(name: str, found: Mapping[Scheme, Sequence[str]]) -> None:
    """Raises when modules differ in group size, which formats with one `group_size` cannot say."""
    groups = sorted({scheme.group for scheme in found})
    if len(groups) > 1:
        raise Unsupported(
            f"{name}: got group sizes {groups}, wanted one for the whole model. Write compressed-tensors instead."
        )


def even_rows(weight: QuantizedWeight, name: str) -> None:
    if weight.n % CODES_PER_WORD:
        raise Unsupported(
            f"{name}: got N={weight.n}, wanted a multiple of {CODES_PER_WORD}. Write compressed-tensors instead."
        )
