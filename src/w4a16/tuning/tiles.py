"""Tile types, one per kernel family: the numbers a tuning row gives a kernel; and the only list of hardware limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..device import Device
from ..problem import Problem
from .gfx11_tiles import Gfx11Tile, gfx11_limit
from .sm90_moe_tiles import Sm90MoeTile, sm90_moe_limit
from .sm90_tiles import Sm90DecodeTile, Sm90PrefillTile, sm90_limit

# Forms of dequantisation and the activation dtypes each serves; kernels/_dequant.py says what they compute.
DEQUANTS = {
    "float_subtract": ("bf16", "fp16"),
    "int_subtract": ("bf16", "fp16"),
    "int_truncate": ("bf16",),
    "magic": ("bf16", "fp16"),
    "carrier": ("fp16",),
    "group_scale": ("bf16", "fp16"),
    "group_sum": ("bf16", "fp16"),
}
DENSE_ROWS = 64  # of W, the fewest that dense dequantises at a time: whole tiles of BLAS
SMALLEST_BLOCK = 16  # of one matrix instruction
LONGEST_SUM = 256  # columns of a group whose offset may cancel against sums of x in fp32 (triton_decode)


@dataclass(frozen=True, kw_only=True)
class CpuTile:
    """block_n: rows of W handled at a time, so that what they dequantise to stays in cache."""

    block_n: int


@dataclass(frozen=True, kw_only=True)
class DenseTile:
    """Rows of W are dequantised workspace_mib at a time (at least DENSE_ROWS); `first`: before the fused kernels."""

    workspace_mib: int
    first: bool = False


@dataclass(frozen=True, kw_only=True)
class ResidentTile:
    """The copy of W is in `dtype` (`act`: that of the activations), rows pad_bytes longer where 2048 divides them."""

    dtype: str = "act"
    pad_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class PrefillTile:
    """One program computes [block_m, block_n] of the output, block_k columns of K at a time (at most a group of them).

    unroll_k      K tiles in one trip of the loop; fewer where that does not divide their number
    dequant       one of DEQUANTS
    weight_first  computes W @ x^T, so that W is the operand wgmma takes from registers
    pinned        AMD GPUs: unpacks codes on their way into LDS, never again on the way out (magic and group forms)
    ahead         asks for scales and zero points a step before their use (forms that scale each weight)
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int = 1
    unroll_k: int = 1
    dequant: str = "int_subtract"
    weight_first: bool = False
    pinned: bool = False
    ahead: bool = False


@dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """block_n rows of W, block_k columns of K a step, K split over split_k programs; dequant one of DEQUANTS."""

    block_n: int
    block_k: int
    split_k: int = 1
    warps: int = 4
    stages: int = 1
    dequant: str = "magic"


@dataclass(frozen=True, kw_only=True)
class MoeTile:
    """As PrefillTile; block_m is also what routing pads each expert's tokens to; group_m blocks of M share W."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 1
    warps: int = 4
    stages: int = 1
    dequant: str = "group_scale"


TILES: dict[str, type[Any]] = {
    "cpu_decode": CpuTile,
    "cpu_prefill": CpuTile,
    "dense": DenseTile,
    "dense_resident": ResidentTile,
    "triton_prefill": PrefillTile,
    "triton_decode": DecodeTile,
    "triton_moe": MoeTile,
    "sm90_decode": Sm90DecodeTile,
    "sm90_prefill": Sm90PrefillTile,
    "sm90_moe": Sm90MoeTile,
    "gfx11_prefill": Gfx11Tile,
    "gfx11_moe": Gfx11Tile,
}


def capped_block_k(block_k: int, group: int) -> int:
    """The columns of K a step really takes: the largest power of two in both `block_k` and a group."""
    return min(block_k, group & -group)


_ON_SUM = ("group_scale", "group_sum")  # forms that keep a second fp32 accumulator
# Most accumulator registers a lane may have, with one and with two accumulators: the next power of two spills on
# gfx1151 (w4a16 isa, Triton 3.6 and 3.9) and, with two, on sm90. gfx9 has twice the registers.
_MOST_SUMS = {"gfx9": (128, 256), "gfx": (64, 128), "sm": (128, 128)}


def why_illegal(stem: str, tile: Any, problem: Problem, device: Device) -> str | None:
    """None when `tile` may run `problem` on `device` by kernel `stem`, else one sentence."""
    if not isinstance(tile, TILES[stem]):
        return f"{stem} takes a {TILES[stem].__name__}, not a {type(tile).__name__}"
    if isinstance(tile, CpuTile):
        return None if tile.block_n > 0 else f"block_n must be positive, not {tile.block_n}"
    if isinstance(tile, DenseTile):
        return None if tile.workspace_mib > 0 else f"workspace_mib must be positive, not {tile.workspace_mib}"
    if isinstance(tile, ResidentTile):
        return _resident_limit(tile)
    if isinstance(tile, Sm90DecodeTile | Sm90PrefillTile):
        return sm90_limit(tile, problem, device)
    if isinstance(tile, Sm90MoeTile):
        return sm90_moe_limit(tile, problem, device)
    sizes = {name: value for name, value in vars(tile).items() if isinstance(value, int) and name not in _FREE}
    for name, value in sizes.items():
        if value < 1 or value & (value - 1):
            return f"{name} must be a power of two, not {value}"
    if tile.warps > _MAX_WARPS:
        return f"warps must be at most {_MAX_WARPS}, not {tile.warps}"
    if isinstance(tile, Gfx11Tile):
        return gfx11_limit(tile, problem, device)
    if not 1 <= tile.stages <= _MAX_STAGES:
        return f"stages must be 1 to {_MAX_STAGES}, not {tile.stages}"
    if isinstance(tile, DecodeTile):
        return _decode_limit(tile, problem, device)
    return (_moe_limit if isinstance(tile, MoeTile) else _matrix_limit)(tile, problem, device)


def _resident_limit(tile: ResidentTile) -> str | None:
    if tile.dtype not in ("act", "fp32"):
        return f"dtype must be act or fp32, not {tile.dtype}"
    return None if tile.pad_bytes % 16 == 0 else f"pad_bytes must be a multiple of 16, not {tile.pad_bytes}"


_FREE = ("stages", "weight_first", "pinned", "ahead")  # fields that need not be powers of two
_MAX_WARPS, _MAX_STAGES = 16, 8


def _decode_limit(tile: DecodeTile, problem: Problem, device: Device) -> str | None:
    """As _matrix_limit, for a block of 16 rows of x."""
    if tile.dequant == "group_scale":
        return "dequant group_scale is not a form of triton_decode: take group_sum or magic"
    if tile.dequant == "group_sum" and problem.group > LONGEST_SUM:
        return f"group_sum unrolls over a group of at most {LONGEST_SUM} columns, not {problem.group}"
    fields = {name: getattr(tile, name) for name in ("block_n", "block_k", "warps", "stages", "dequant")}
    return _matrix_limit(PrefillTile(block_m=SMALLEST_BLOCK, **fields), problem, device)


def _moe_limit(tile: MoeTile, problem: Problem, device: Device) -> str | None:
    """Weights rounded once more than the hidden rows and the output would pass bf16's bound on the error."""
    if tile.dequant == "group_sum" or (problem.act == "bf16" and tile.dequant != "group_scale"):
        return f"dequant {tile.dequant} does not serve experts in {problem.act}: take group_scale"
    return _matrix_limit(tile, problem, device)


def _matrix_limit(tile: PrefillTile | MoeTile, problem: Problem, device: Device) -> str | None:
    """The limits of a kernel that keeps a block_m x block_n accumulator and feeds the matrix units."""
    block_k = capped_block_k(tile.block_k, problem.group)
    small = min(tile.block_m, tile.block_n, block_k)
    if small < SMALLEST_BLOCK:
        return f"blocks must be at least {SMALLEST_BLOCK}, and group a multiple of it (group={problem.group}, {tile})"
    if problem.act not in DEQUANTS.get(tile.dequant, ()):
        forms = ", ".join(form for form, acts in DEQUANTS.items() if problem.act in acts)
        return f"dequant {tile.dequant} does not serve {problem.act}, which has {forms or 'none'}"
    if getattr(tile, "pinned", False) and not device.arch.startswith("gfx"):
        return f"pinned is an AMD instruction; {device.arch} has none"
    lanes = 64 if device.family == "gfx9" else 32
    copies = 2 if tile.dequant in _ON_SUM else 1
    sums = copies * tile.block_m * tile.block_n // (lanes * tile.warps)
    most = next(limits for arch, limits in _MOST_SUMS.items() if device.arch.startswith(arch))[copies - 1]
    if sums > most:
        return f"{sums} accumulator registers a lane; more than {most} spill on {device.arch}"
    shared = _shared_bytes(tile, block_k, device)
    if shared > device.shared_bytes:
        return f"{shared} bytes of shared memory, {device.arch} has {device.shared_bytes}"
    return None


def _shared_bytes(tile: PrefillTile | MoeTile, block_k: int, device: Device) -> int:
    """At most this: x and words of every stage and one dequantised operand; on NVIDIA, the output on its way out."""
    x, words, weights = 2 * tile.block_m * block_k, tile.block_n * block_k // 2, 2 * tile.block_n * block_k
    loop = x + weights if tile.stages == 1 else tile.stages * (x + words) + weights
    return loop if device.arch.startswith("gfx") else max(loop, 2 * tile.block_m * tile.block_n)
