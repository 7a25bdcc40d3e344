"""What is timed: w4a16, each of its kernels by stem, the vendor BLAS on dense weights, and peers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import layouts
from ..api import linear, pack
from ..device import Device, current_device
from ..dispatch import launcher, layout_for
from ..dispatch_table import TABLE, Row
from ..errors import BadInput, explain_mismatch
from ..layouts import PackedWeight
from ..problem import ACT_NAMES, Problem
from ..tuning.table import tile_for
from ..weight import QuantizedWeight
from . import peers
from .peers import Multiply, Refuses, copied


@dataclass(frozen=True, kw_only=True)
class Provider:
    """prepare(weight, act, copies) packs so many and gives x -> y of each; unsupported(problem, device) is a sentence
    or None.

    roundings   by how much the house bound on the error is multiplied, for peers that round more often than ours do
    """

    name: str
    prepare: Callable[[QuantizedWeight, torch.dtype, int], list[Multiply]]
    unsupported: Refuses
    dense: bool = False
    roundings: int = 1


def repacked(packed: PackedWeight, copies: int) -> list[PackedWeight]:
    """A packed weight and copies of it: packing each would take most of a benchmark's time."""
    return [packed, *(_again(packed) for _ in range(copies - 1))]


def _again(packed: PackedWeight) -> PackedWeight:
    zeros = None if packed.zeros is None else copied(packed.zeros)
    return replace(packed, codes=copied(packed.codes), scales=copied(packed.scales), zeros=zeros)


def _w4a16(weight: QuantizedWeight, act: torch.dtype, copies: int) -> list[Multiply]:
    packed = repacked(pack(weight, device=weight.codes.device, act=act), copies)
    return [functools.partial(linear, weight=one) for one in packed]


def _dense(weight: QuantizedWeight, act: torch.dtype, copies: int) -> list[Multiply]:
    values = weight.dequantize(act).t()
    return [functools.partial(torch.mm, mat2=one) for one in (values, *(copied(values) for _ in range(copies - 1)))]


def _kernel(row: Row) -> Provider:
    """One of our kernels whatever dispatch would choose."""

    def prepare(weight: QuantizedWeight, act: torch.dtype, copies: int) -> list[Multiply]:
        where = current_device(weight.codes.device)

        def multiply(x: Tensor, packed: PackedWeight) -> Tensor:
            out = x.new_empty((x.shape[0], packed.n))
            problem = problem_of(weight, x)
            tile = tile_for(row.stem, problem, where)
            launcher(row.stem)(out=out, x=x, weight=packed, bias=None, tile=tile)
            return out

        packed = repacked(_packed_for(row, weight, act, where), copies)
        return [functools.partial(multiply, packed=one) for one in packed]

    return Provider(name=row.stem, prepare=prepare, unsupported=row.unsupported)


def _packed_for(row: Row, weight: QuantizedWeight, act: torch.dtype, where: Device) -> PackedWeight:
    device = weight.codes.device
    problem = Problem(m=1, n=weight.n, k=weight.k, group=weight.group, act=ACT_NAMES[act], has_zeros=weight.has_zeros)
    here = [each for each in TABLE if each.stem == row.stem and (each.arch is None or where.arch.startswith(each.arch))]
    reads = [layout for each in here for layout in each.layouts]
    if layout_for(problem, where) in reads:
        return pack(weight, device=device, act=act)
    return layouts.pack(weight, layout=reads[0], act=act)


def problem_of(weight: QuantizedWeight, x: Tensor) -> Problem:
    return Problem(
        m=x.shape[0],
        n=weight.n,
        k=weight.k,
        group=weight.group,
        act=ACT_NAMES[x.dtype],
        has_zeros=weight.has_zeros,
    )


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(name="w4a16", prepare=_w4a16, unsupported=lambda problem, device: None),
        Provider(name="cublas", prepare=_dense, unsupported=lambda problem, device: None, dense=True),
        Provider(name="tinygemm", prepare=peers.tinygemm, unsupported=peers.tinygemm_unsupported),
        Provider(name="gemlite", prepare=peers.gemlite, unsupported=peers.needs("gemlite")),
        Provider(name="humming", prepare=peers.humming, unsupported=peers.needs("humming"), roundings=2),
        # dense_resident is cublas over a copy that is there already
        *(_kernel(row) for row in TABLE if row.op == "linear" and row.stem != "dense_resident"),
    )
}


def providers_of(names: str) -> tuple[Provider, ...]:
    """Providers from a comma-separated list. Raises BadInput that lists them all when a name is none of them."""
    wanted = ", ".join(PROVIDERS)
    for name in names.split(","):
        if name not in PROVIDERS:
            raise BadInput(explain_mismatch("providers", got=name, wanted=wanted, then="Name some of these."))
    return tuple(PROVIDERS[name] for name in names.split(","))
