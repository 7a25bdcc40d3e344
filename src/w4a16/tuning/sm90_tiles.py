"""Tiles of the Gluon kernels of Hopper, what its registers and shared memory allow, and how K is split for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import Device
from ..layouts.sm90 import TILE
from ..problem import Problem

MOST_CLUSTER = 8  # programs of a cluster on every Hopper GPU
SPLITS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, kw_only=True)
class Sm90DecodeTile:
    """16 * warps / parts rows of W a program.

    parts      of K, that the warps of a program share
    depth      tiles of 64 columns on their way, in registers
    split_k    programs of a cluster that share K; 0: as many as fill the SMs
    slabs      of x (depth tiles wide) that shared memory holds whole; more than these pass through a ring
    ring       slabs of that ring: one is read while the others are on their way
    residents  programs an SM holds at a time by the registers they take; settled: the most it may hold
    registers  the most a thread may have; 0: as many as the compiler likes
    early      a tile that takes another's place is asked for before that one's product: sooner, for more registers
    l2_ahead   tiles after those on their way are asked into the L2 cache
    """

    warps: int = 4
    parts: int = 1
    depth: int = 8
    split_k: int = 0
    slabs: int = 3
    ring: int = 3
    residents: int = 5
    registers: int = 0
    early: bool = False
    l2_ahead: bool = False

    @property
    def rows(self) -> int:
        """Of W, a program."""
        return 16 * self.warps // self.parts


@dataclass(frozen=True, kw_only=True)
class Sm90PrefillTile:
    """One program computes [block_m, 64 * warpgroups] at a time.

    block_k     columns of K between two waits for the matrix units
    stages      tiles of x and of codes, 64 columns each, in the ring
    residents   programs an SM holds at a time
    in_turn     warpgroups start their products one after the other
    registers   a thread has at the start; fewer than fill an SM leave room for programs of the next launch; 0: all
    split_k     parts of K; 0: as many as end first (`sm90_us`)
    paired      two parts, added by the two programs of a cluster; else a second launch adds them
    step_ns     measured: 64 columns of K, on every SM
    rest        the tile of a second launch, for the rows of W past first_n, or those of x past first_m: where all in
                one would leave many SMs of the last wave without a program; None: there is one launch
    """

    block_m: int
    warpgroups: int
    block_k: int
    stages: int
    residents: int = 1
    in_turn: bool = False
    registers: int = 0
    split_k: int = 0
    paired: bool = False
    step_ns: float = 0.0
    first_n: int = 0
    first_m: int = 0
    rest: Sm90PrefillTile | None = None


# Of the time of a launch, fitted to 412 measurements (docs/measured.md, #7): microseconds, and per byte of the parts.
# TWO_US: two programs on every SM. FULL_US: tiles that leave no registers for the programs that add the parts. ALONE: a
# step of a program that has an SM to itself where two could have it. BOX_NS: a box of x, where a block is not whole.
WAVE_US, TWO_US, ADD_US, ADD_US_PER_BYTE, FULL_US = 1.70, 0.57, 0.44, 0.307e-6, 2.55
PAIR_US, PAIR_US_PER_BYTE = 1.11, 0.175e-6
ALONE, BOX_NS = 0.81, 43.0


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _blocks(tile: Sm90PrefillTile, problem: Problem) -> int:
    return cdiv(problem.m, tile.block_m) * cdiv(problem.n, TILE * tile.warpgroups)


@functools.cache
def _boxes(block_m: int, left: int) -> int:
    """Boxes of x that copy the rows left for the last block, not a whole one, but for those of its whole products."""
    rest = block_m
    main, odd = 1 << rest.bit_length() >> 1, rest & -rest
    while rest and left >= (product := 1 << rest.bit_length() >> 1):
        left, rest = left - product, rest - product
    return cdiv(left, max(min(main // 4, odd), 8))


def sm90_us(tile: Sm90PrefillTile, problem: Problem, device: Device) -> float:
    """Predicted microseconds, but for a constant: whole waves of programs, and adding the parts where K is split."""
    units = _blocks(tile, problem) * tile.split_k
    slots = device.compute_units * tile.residents
    steps = cdiv(cdiv(problem.k, tile.block_k), tile.split_k) * (tile.block_k // TILE)
    two = tile.residents > 1 and units > device.compute_units
    step_ns = tile.step_ns * (ALONE if tile.residents > 1 and not two else 1.0)
    step_us = 1e-3 * max(step_ns, BOX_NS * _boxes(tile.block_m, problem.m % tile.block_m))
    us = cdiv(units, slots) * (WAVE_US + steps * step_us) + (TWO_US if two else 0.0)
    if tile.split_k == 1:
        return us
    parts = 8 * tile.split_k * problem.m * problem.n  # bytes written and read, by a pair half of them
    if tile.paired:
        return us + PAIR_US + parts / 2 * PAIR_US_PER_BYTE
    crowded = not tile.registers and units > 0.8 * slots
    return us + ADD_US + parts * ADD_US_PER_BYTE + (FULL_US if crowded else 0.0)


def prefill_choices(tile: Sm90PrefillTile, problem: Problem, device: Device) -> Iterator[Sm90PrefillTile]:
    """The tile with K in every number of parts worth a thought: at most one wave of programs, 512 columns a part."""
    units, slots = _blocks(tile, problem), device.compute_units * tile.residents
    for choice in _in_parts(tile):
        split = choice.split_k
        if split > 1 and (units * split > slots or problem.k < 512 * split):
            return
        yield choice


@functools.cache
def _in_parts(tile: Sm90PrefillTile) -> tuple[Sm90PrefillTile, ...]:
    """The tile with K in every number of parts, ascending; built once, as that takes longer than to compare them."""
    parts = [replace(tile, split_k=split) for split in SPLITS]
    if _unpaired(tile) is None:
        parts.insert(SPLITS.index(2) + 1, replace(tile, split_k=2, paired=True))
    return tuple(parts)


def _unpaired(tile: Sm90PrefillTile) -> str | None:
    """Why no two programs can share a block's columns, or None: ptxas spills where sums are many, or three products."""
    roomy = tile.warpgroups < 3 and not (tile.block_m == 256 and tile.registers)
    if roomy and tile.block_m % 16 == 0 and tile.block_m.bit_count() < 3:
        return None
    return f"paired needs a block_m of two powers of two at most, 16 or more, not {tile.block_m} of {tile.warpgroups}"


def sm90_limit(tile: Sm90DecodeTile | Sm90PrefillTile, problem: Problem, device: Device) -> str | None:
    """None when `tile` may run `problem` on `device`, else one sentence."""
    if device.arch != "sm90":
        return f"its instructions are those of sm90; this is {device.arch}"
    if tile.split_k < 1:
        return "split_k is settled by tuning rows alone: give a number of parts"
    if isinstance(tile, Sm90DecodeTile):
        return _decode_limit(tile, problem, device)
    if tile.rest is None:
        return _prefill_limit(tile, device)
    if (tile.first_n == 0) == (tile.first_m == 0):
        return f"first_n or first_m is the first launch's: {tile.first_n} and {tile.first_m}"
    if not 0 <= tile.first_n < problem.n or tile.first_n % TILE:
        return f"first_n must be a multiple of {TILE} less than n ({problem.n}), not {tile.first_n}"
    if not 0 <= tile.first_m < problem.m:
        return f"first_m must be less than m ({problem.m}), not {tile.first_m}"
    return _prefill_limit(tile, device) or sm90_limit(tile.rest, problem, device)


def _decode_limit(tile: Sm90DecodeTile, problem: Problem, device: Device) -> str | None:
    if problem.m > 16:
        return f"m must be at most 16, not {problem.m}"
    if tile.warps not in (4, 8, 16):
        return f"warps must be 4, 8 or 16, not {tile.warps}"
    if tile.parts not in (1, 2, 4, 8) or tile.parts > tile.warps:
        return f"parts must be 1, 2, 4 or 8 and at most warps ({tile.warps}), not {tile.parts}"
    if tile.parts > 1 and problem.experts:
        return f"parts must be 1 for experts, not {tile.parts}"
    if tile.depth not in (2, 4, 8, 16):
        return f"depth must be 2, 4, 8 or 16, not {tile.depth}"
    if tile.split_k not in (1, 2, 4, 8):
        return f"split_k must be 1, 2, 4 or 8 (a cluster has at most {MOST_CLUSTER} programs), not {tile.split_k}"
    if not 2 <= tile.ring <= tile.slabs:
        return f"ring must be 2 to slabs ({tile.slabs}), not {tile.ring}"
    shared = decode_shared_bytes(tile, problem.m, problem.k, problem.group, problem.has_zeros)
    if shared > device.shared_bytes:
        return f"{shared} bytes of shared memory, {device.arch} has {device.shared_bytes}"
    return None


def _prefill_limit(tile: Sm90PrefillTile, device: Device) -> str | None:
    if tile.block_m not in (8, 16, 32, 64, 80, 96, 128, 136, 144, 160, 192, 224, 256):
        return f"block_m must be a power of two of 8 to 256, or 80, 96, 136, 144, 160, 192 or 224, not {tile.block_m}"
    if tile.warpgroups not in (1, 2, 3):
        return f"warpgroups must be 1, 2 or 3, not {tile.warpgroups}"
    if tile.in_turn and tile.warpgroups == 1:
        return "in_turn needs two warpgroups or three, not 1"
    if tile.paired and (tile.split_k != 2 or _unpaired(tile)):
        return _unpaired(tile) or f"paired needs two parts of K, not {tile.split_k}"
    if (
        tile.block_k not in (64, 128, 256)
        or tile.stages < 2 * tile.block_k // TILE
        or tile.stages * TILE % tile.block_k
    ):
        return f"block_k must be 64, 128 or 256 and the ring two or more: block_k={tile.block_k}, stages={tile.stages}"
    shared = sm90_shared_bytes(tile)
    if shared * tile.residents > device.shared_bytes:
        return f"{shared} bytes of shared memory x {tile.residents}, {device.arch} has {device.shared_bytes}"
    return None


def sm90_shared_bytes(tile: Sm90PrefillTile) -> int:
    """The ring (x, codes, scales and zero points of groups of 32, barriers) and the output on its way out."""
    weight = TILE * TILE // 2 + 2 * 256
    stage = 2 * TILE * tile.block_m + tile.warpgroups * weight + 16
    outs = 1.0 if tile.split_k == 1 else 0.5 if tile.paired else 0.0  # of a block's rows that one program stores
    out = int(outs * 2 * TILE * tile.block_m * tile.warpgroups)
    return tile.stages * stage + out + 1024


def group_of_tiles(group: int, k: int) -> int:
    """The columns of a group; where it is all of K, those of whole tiles."""
    return cdiv(k, TILE) * TILE if group == k else group


def chunk_of(group: int, depth: int) -> int:
    """Tiles in a row that surely share their scales, of depth on their way; group: as `group_of_tiles` gives it."""
    tiles = max(group // 64, 1)
    return min(tiles & -tiles, depth)


def decode_share(tile: Sm90DecodeTile, k: int, group: int) -> int:
    """The tiles of a part of K, in whole chunks; the last part may have fewer, or none."""
    chunk = chunk_of(group_of_tiles(group, k), tile.depth)
    return cdiv(cdiv(cdiv(k, TILE), tile.parts * tile.split_k), chunk) * chunk


def decode_shared_bytes(tile: Sm90DecodeTile, m: int, k: int, group: int, has_zeros: bool) -> int:
    """Slabs of x, scales and zero points; what adds the parts of a program takes their place."""
    trips = cdiv(decode_share(tile, k, group), tile.depth)
    slabs = trips if trips <= tile.slabs else tile.ring
    columns = group_of_tiles(group, k)
    lines = 2 * tile.depth if columns == 32 else tile.depth // chunk_of(columns, tile.depth)
    x = 2 * tile.parts * (8 if m <= 8 else 16) * TILE * tile.depth
    return slabs * (x + lines * 16 * tile.warps * (3 if has_zeros else 2))
