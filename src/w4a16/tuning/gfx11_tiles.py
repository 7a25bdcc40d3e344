"""Tiles of the Gluon kernels of gfx11, and what its WMMA, registers and LDS allow."""

from __future__ import annotations

from dataclasses import dataclass

from ..device import Device
from ..problem import Problem

WMMA = 16  # rows, columns and depth of one matrix instruction
LANES = 32
GROUPS = (32, 64, 128)  # a trip of the loop is a group, or two of one step: it is unrolled
FEEDS = ("registers", "lds", "producers")
ROUNDINGS = ("even", "zero")
MOST_SUMS = 128  # accumulator registers a lane: twice as many leave none of 256 for operands


@dataclass(frozen=True, kw_only=True)
class Gfx11Tile:
    """One program computes [block_m, block_n] of the output, block_k columns of K a step.

    warps_m   warps along M; in feed "registers" each of them unpacks the same weights
    warps_n   warps along N
    feed      the way of W to the matrix instruction: "registers" (each lane unpacks its own operand), "lds" (all warps
              unpack each weight once), "producers" (so do as many warps again, which multiply nothing)
    dequant   "magic": (code - zero) * scale; "group_sum": MAGIC + code, the rest on the fp32 sum of each group
    rounding  of the product in "magic": to nearest "even", or towards "zero" (bf16)
    """

    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    feed: str = "registers"
    dequant: str = "magic"
    rounding: str = "even"

    @property
    def consumers(self) -> int:
        """Warps that multiply."""
        return self.warps_m * self.warps_n

    @property
    def warps(self) -> int:
        return self.consumers * (2 if self.feed == "producers" else 1)

    @property
    def sums(self) -> int:
        """Accumulator registers of a lane."""
        return self.block_m * self.block_n // (LANES * self.consumers) * (2 if self.dequant == "group_sum" else 1)


def paired_block_k(block_k: int, k: int, group: int) -> int:
    """The columns of K a step really takes: at most a group, and two steps divide K (two blocks of LDS in turn)."""
    step = min(block_k, group)
    return step if k % (2 * step) == 0 else step // 2


def gfx11_limit(tile: Gfx11Tile, problem: Problem, device: Device) -> str | None:
    """None when `tile` may run `problem` on `device`, else one sentence; sizes are known to be powers of two."""
    if not device.arch.startswith("gfx11"):
        return f"its instructions are those of gfx11; this is {device.arch}"
    if problem.group not in GROUPS:
        return f"group must be {', '.join(map(str, GROUPS))}, not {problem.group}"
    named = {"feed": (tile.feed, FEEDS), "rounding": (tile.rounding, ROUNDINGS)}
    named["dequant"] = (tile.dequant, ("magic", "group_sum"))
    for name, (value, known) in named.items():
        if value not in known:
            return f"{name} must be {' or '.join(known)}, not {value}"
    if tile.rounding == "zero" and (problem.act != "bf16" or tile.dequant != "magic"):
        return "rounding zero cuts the product of dequant magic in bf16; nothing else rounds in software"
    if tile.feed == "producers" and (problem.experts or tile.dequant != "magic"):
        return "feed producers is a linear layer's, with dequant magic: consumers know no scales"
    if problem.experts and (sentence := _moe_limit(tile, problem)):
        return sentence
    if tile.block_m < WMMA * tile.warps_m or tile.block_n < WMMA * tile.warps_n:
        of_a_warp = f"{tile.block_m}/{tile.warps_m} x {tile.block_n}/{tile.warps_n}"
        return f"a warp computes at least {WMMA} x {WMMA}, not {of_a_warp}"
    if paired_block_k(tile.block_k, problem.k, problem.group) < WMMA:
        return f"a step of K must be at least {WMMA} columns: block_k={tile.block_k}, k={problem.k}"
    if tile.sums > MOST_SUMS:
        return f"{tile.sums} accumulator registers a lane; more than {MOST_SUMS} leave none for operands"
    shared = gfx11_shared_bytes(tile, problem)
    if shared > device.shared_bytes:
        return f"{shared} bytes of LDS, {device.arch} has {device.shared_bytes}"
    return None


def _moe_limit(tile: Gfx11Tile, problem: Problem) -> str | None:
    """Routing gives a block its rows; bf16 weights rounded on top of the hidden rows would pass the error bound."""
    if tile.warps_m > 1:
        return f"warps_m must be 1 for experts, whose blocks may have {WMMA} rows, not {tile.warps_m}"
    if tile.block_n < 2 * WMMA * tile.warps_n:
        return f"block_n must be at least {2 * WMMA * tile.warps_n}: each warp holds gate and up of its columns"
    if problem.act == "bf16" and tile.dequant != "group_sum":
        return f"dequant {tile.dequant} does not serve experts in bf16: take group_sum"
    return None


def gfx11_shared_bytes(tile: Gfx11Tile, problem: Problem) -> int:
    """Two blocks of x and, but in feed "registers", two of weights, 16 bits each."""
    rows = tile.block_m + (0 if tile.feed == "registers" else tile.block_n)
    return 4 * rows * paired_block_k(tile.block_k, problem.k, problem.group)
