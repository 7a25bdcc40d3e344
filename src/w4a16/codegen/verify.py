"""Executes the machine code of every kernel and dequantisation variant for gfx11 on small problems, without a GPU."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..device import Device
from ..errors import BadInput, W4A16Error, explain_mismatch
from ..kernels._launch import Launch
from ..layouts import SKINNY, PackedWeight, pack, pad_rows
from ..problem import ACT_DTYPES, Problem
from ..reference import reference_linear, reference_moe
from ..tuning.gfx11_tiles import Gfx11Tile
from ..tuning.table import tile_for
from ..tuning.tiles import DEQUANTS, DecodeTile, MoeTile, PrefillTile, why_illegal
from ..weight import QuantizedWeight, pack_nibbles
from .compile import Compiled, compile_launch
from .gfx11.launch import execute

BOUNDS = {"bf16": 4e-3, "fp16": 1e-3}  # relative RMS, as everywhere in w4a16
MOST_FLIPPED = 0.02  # of the outputs: sums that end near the middle of two neighbours
FAMILY = "gfx11"
SEED = 0

# The smallest tiles that still have several warps, several matrix instructions and several steps along K.
SMALL_TILES = {
    "triton_prefill": PrefillTile(block_m=32, block_n=32, block_k=32, warps=4),
    "triton_decode": DecodeTile(block_n=16, block_k=64, warps=4),
    "triton_moe": MoeTile(block_m=16, block_n=32, block_k=32, warps=4),
    "gfx11_prefill": Gfx11Tile(block_m=16, block_n=32, block_k=32, warps_m=1, warps_n=2, feed="lds"),
    "gfx11_moe": Gfx11Tile(block_m=16, block_n=64, block_k=32, warps_m=1, warps_n=2, feed="lds"),
}
# gfx11_prefill: more blocks than walk over N together. gfx11_moe: most rows of a block have work.
ROWS = {"triton_decode": (1, 5), "gfx11_prefill": (69,), "gfx11_moe": (48,)}
# Fields of a tile that select code of their own, beside `dequant`.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "pinned": (True,),
    "weight_first": (True,),
    "unroll_k": (2,),
    "split_k": (4,),
    "matrix": (False,),
    "stages": (3,),
    "ahead": (True,),
    "feed": ("registers", "producers"),
    "rounding": ("zero",),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One kernel, one tile, one problem."""

    stem: str
    tile: Any
    problem: Problem
    bias: bool

    @property
    def bound(self) -> float:
        return BOUNDS[self.problem.act]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """error: relative RMS against the reference; flipped: the part of the outputs that are not the known bits;
    executed: wave-instructions; failure: why there is no error
    """

    check: Check
    error: float
    executed: int
    failure: str | None = None
    flipped: float = 0.0

    @property
    def passed(self) -> bool:
        return self.failure is None and self.error <= self.check.bound and self.flipped <= MOST_FLIPPED


@dataclass(kw_only=True)
class Call:
    """A Check with its tensors: what to launch, where the result appears and what it should be."""

    launches: tuple[Launch, ...]
    out: Tensor
    wanted: Tensor
    bits: Tensor | None = None  # the output in its dtype, where the form fixes it
    filled: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        tensors = {id(t): t for launch in self.launches for t in launch.args.values() if isinstance(t, Tensor)}
        self.filled = [(tensor, tensor.clone()) for tensor in tensors.values()]

    def reset(self) -> None:
        """Every tensor as it was before the launches."""
        for tensor, before in self.filled:
            tensor.copy_(before)

    def error(self) -> float:
        """Relative RMS; NaN, which no bound admits, where the result is not finite."""
        return float((self.out.float() - self.wanted).norm() / self.wanted.norm())

    def flipped(self) -> float:
        """The part of the outputs that are not `bits`; 0 where those are not known."""
        return 0.0 if self.bits is None else float((self.out != self.bits).float().mean())


def stems() -> list[str]:
    """The Triton and Gluon kernels that can run on gfx11."""
    names = (module.name for module in pkgutil.iter_modules(kernels.__path__))
    return [name for name in names if name.startswith(("triton_", "gfx11_"))]


def checks(device: Device, stem: str, m: tuple[int, ...] = ()) -> Iterator[Check]:
    """Every variant of a kernel; forms, zero points, groups and rows vary together, not each with each."""
    if device.family != FAMILY:
        raise BadInput(explain_mismatch("device", got=device.arch, wanted="a gfx11 GPU", then="Name gfx1151."))
    if stem not in stems():
        raise BadInput(explain_mismatch("--kernel", got=stem, wanted=", ".join(stems()), then="Name one."))
    turn = itertools.count()
    for act, zeros in itertools.product(BOUNDS, (True, False)):
        for problem in _problems(stem, act, zeros, m):
            tile = SMALL_TILES.get(stem) or tile_for(stem, problem, device)
            for variant in variants(tile, act):
                if why_illegal(stem, variant, problem, device) is None and not _refused(stem, variant):
                    yield Check(stem=stem, tile=variant, problem=problem, bias=next(turn) % 2 == 0)


def variants(tile: Any, act: str) -> Iterator[Any]:
    """The tile in each form of dequantisation that serves `act`, then with each field that selects other code."""
    if hasattr(tile, "dequant"):
        yield from (replace(tile, dequant=form) for form, acts in DEQUANTS.items() if act in acts)
        tile = replace(tile, dequant="magic")
    else:
        yield tile
    for name, values in VARIANTS.items():
        yield from (replace(tile, **{name: value}) for value in values if hasattr(tile, name))


def _refused(stem: str, tile: Any) -> bool:
    """group_sum is no form of triton_moe."""
    return stem == "triton_moe" and tile.dequant == "group_sum"


def _problems(stem: str, act: str, zeros: bool, m: tuple[int, ...]) -> Iterator[Problem]:
    if stem.endswith("_moe"):
        sizes: dict[str, Any] = {"n": 64, "k": 64, "group": 32, "experts": 4, "top_k": 2}
        if stem.startswith(FAMILY):
            sizes |= {"n": 128, "k": 128}  # two trips of the loop
        rows = m or ROWS.get(stem, (5,))
    else:
        sizes = {"n": 72, "k": 256, "group": 64 if zeros else 128}
        if stem.startswith(FAMILY):
            sizes["k"] = 5 * sizes["group"]  # trips of the loop: LLVM may unroll it by four, with a loop for the rest
        rows = m or ROWS.get(stem, (37,))
    for row in rows:
        yield Problem(m=row, act=act, has_zeros=zeros, **sizes)


def prepare(check: Check, device: Device) -> Call:
    """The check's tensors, from a fixed seed; outputs and workspaces hold NaN until the kernel writes them."""
    generator = torch.Generator().manual_seed(SEED)
    problem, act = check.problem, ACT_DTYPES[check.problem.act]
    x = torch.randn((problem.m, problem.k), generator=generator).to(act)
    plan = importlib.import_module(f"..kernels.{check.stem}", __package__).plan
    weight = _weight(problem, problem.n, problem.k, generator)
    if not problem.experts:
        out = x.new_empty((problem.m, problem.n))
        bias = torch.randn(problem.n, generator=generator).to(act) if check.bias else None
        wanted = reference_linear(x, weight, bias)
        launches = plan(out=out, x=x, weight=_packed(weight, device), bias=bias, tile=check.tile)
        bits = _known_bits(check, x, weight, bias)
        return _poisoned(Call(launches=launches, out=out, wanted=wanted, bits=bits), x, bias)
    w2 = _weight(problem, problem.k, problem.n // 2, generator)
    routed = (problem.m, problem.top_k)
    ids = torch.rand((problem.m, problem.experts), generator=generator).topk(problem.top_k).indices
    given: dict[str, Any] = {
        "topk_weights": torch.rand(routed, generator=generator),
        "topk_ids": ids,
        "activation": "silu",
        "gated": True,
        "weight_input": check.bias,  # one of the two places of the router's weights a check
    }
    out = x.new_empty((problem.m, problem.k))
    launches = plan(out=out, x=x, w13=_packed(weight, device), w2=_packed(w2, device), tile=check.tile, **given)
    wanted = reference_moe(x, weight, w2, **given)
    return _poisoned(Call(launches=launches, out=out, wanted=wanted), x, given["topk_weights"])


def _known_bits(check: Check, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """The output's bits, up to the last of a sum, where a gfx11 kernel's form fixes the weights' own; else None.

    group_sum in fp16 fixes them too, but cancels 1024 times a group's sum.
    """
    tile, act = check.tile, check.problem.act
    if not check.stem.startswith(FAMILY) or (tile.dequant, act) == ("group_sum", "fp16"):
        return None
    weights = weight.dequantize(torch.float32)
    if tile.rounding == "zero":
        weights = (weights.view(torch.int32) & -65536).view(torch.float32)
    elif tile.dequant == "magic":
        weights = weights.to(x.dtype)
    return (x.double() @ weights.double().t() + (0 if bias is None else bias.double())).to(x.dtype)


def _poisoned(call: Call, *inputs: Tensor | None) -> Call:
    """Fills what the launches allocate or write: every floating-point [M, ...] tensor that is no input, with NaN."""
    known = {t.data_ptr() for t in inputs if t is not None}
    for launch in call.launches:
        for name, tensor in launch.args.items():
            written = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.data_ptr() not in known
            if written and not name.startswith(("scales", "bias", "x_")):
                tensor.fill_(float("nan"))
    call.__post_init__()
    return call


def _weight(problem: Problem, n: int, k: int, generator: torch.Generator) -> QuantizedWeight:
    lead = (problem.experts,) if problem.experts else ()
    grid = (*lead, n, k // problem.group)
    scales = torch.rand(grid, generator=generator) * 0.02 + 0.005
    return QuantizedWeight(
        codes=pack_nibbles(torch.randint(0, 16, (*lead, n, k), generator=generator)),
        scales=scales.to(ACT_DTYPES[problem.act]),
        zeros=torch.randint(0, 16, grid, generator=generator).to(torch.uint8) if problem.has_zeros else None,
        group=problem.group,
    )


def _packed(weight: QuantizedWeight, device: Device) -> PackedWeight:
    packed = pack(weight, layout=SKINNY)
    return pad_rows(packed) if device.family == FAMILY else packed


def compile_call(call: Call, device: Device) -> list[Compiled]:
    return [compile_launch(launch, device) for launch in call.launches]


def run(check: Check, device: Device) -> Outcome:
    """Compiles, executes and compares one check; a fault or an unknown instruction is its failure."""
    call, executed = prepare(check, device), 0
    try:
        for compiled in compile_call(call, device):
            executed += execute(compiled).executed
    except W4A16Error as error:
        return Outcome(check=check, error=float("nan"), executed=executed, failure=str(error))
    return Outcome(check=check, error=call.error(), flipped=call.flipped(), executed=executed)


def verify(device: Device, names: list[str], m: tuple[int, ...], show: Callable[[Outcome], None]) -> list[Outcome]:
    """Every check of the named kernels (default all), each shown when done."""
    outcomes = []
    for stem in names or stems():
        for check in checks(device, stem, m):
            outcomes.append(run(check, device))
            show(outcomes[-1])
    return outcomes
