"""Tiles of the Gluon kernels of Hopper, what its registers and shared memory allow, and how K is split for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..device import Device
from ..layouts.sm90 import TILE
from ..problem import Problem

MOST_CLUSTER = 8  # programs of a cluster on every Hopper GPU
SPLITS = (1, 2, 3, 4, 6, 8)
ADDING_TILES = 4  # what adding the parts of a cluster takes, in tiles of 64 x 64 a program reads: 1 to 1.5 us


@dataclass(frozen=True, kw_only=True)
class Sm90DecodeTile:
    """16 * warps rows of W a program.

    depth      tiles of 64 columns on their way, in registers
    split_k    programs of a cluster that share K; 0: as many as fill the SMs
    slabs      of x (depth tiles wide) that shared memory holds whole; more than these pass through a ring
    ring       slabs of that ring: one is read while the others are on their way
    residents  programs an SM holds at a time, by the registers they take
    registers  the most a thread may have; 0: as many as the compiler likes
    """

    warps: int = 4
    depth: int = 8
    split_k: int = 0
    slabs: int = 3
    ring: int = 3
    residents: int = 5
    registers: int = 0


@dataclass(frozen=True, kw_only=True)
class Sm90PrefillTile:
    """One program computes [block_m, 64 * warpgroups] at a time.

    block_k     columns of K between two waits for the matrix units
    stages      tiles of x and of codes, 64 columns each, in the ring
    residents   programs an SM holds at a time
    in_turn     warpgroups start their products one after the other
    registers   a thread has at the start; fewer than fill an SM leave room for programs of the next launch; 0: all
    split_k     parts of K; 0: as many as end first (`sm90_us`)
    step_ns     measured: 64 columns of K, on every SM
    """

    block_m: int
    warpgroups: int
    block_k: int
    stages: int
    residents: int = 1
    in_turn: bool = False
    registers: int = 0
    split_k: int = 0
    step_ns: float = 0.0


# Of the time of a launch, fitted to 444 measurements (docs/measured.md, #7): microseconds, and per byte of the parts.
# FULL_US: tiles that leave no registers for the programs that add the parts; ALONE: a step of a program that has an SM
# to itself where two could have it.
WAVE_US, ADD_US, ADD_US_PER_BYTE, FULL_US, ALONE = 1.80, 1.62, 0.236e-6, 2.55, 0.58


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _blocks(tile: Sm90PrefillTile, problem: Problem) -> int:
    return cdiv(problem.m, tile.block_m) * cdiv(problem.n, TILE * tile.warpgroups)


def sm90_us(tile: Sm90PrefillTile, problem: Problem, device: Device) -> float:
    """Predicted microseconds, but for a constant: whole waves of programs, and adding the parts where K is split."""
    units = _blocks(tile, problem) * tile.split_k
    slots = device.compute_units * tile.residents
    steps = cdiv(cdiv(problem.k, tile.block_k), tile.split_k) * (tile.block_k // TILE)
    step_us = tile.step_ns * 1e-3 * (ALONE if tile.residents > 1 and units <= device.compute_units else 1.0)
    us = cdiv(units, slots) * (WAVE_US + steps * step_us)
    if tile.split_k == 1:
        return us
    parts = 8 * tile.split_k * problem.m * problem.n  # bytes written and read
    crowded = not tile.registers and units > 0.8 * slots
    return us + ADD_US + parts * ADD_US_PER_BYTE + (FULL_US if crowded else 0.0)


def prefill_splits(tile: Sm90PrefillTile, problem: Problem, device: Device) -> Iterable[int]:
    """Numbers of parts worth a thought: at most one wave of programs, 512 columns a part."""
    units = _blocks(tile, problem)
    for split in SPLITS:
        if split == 1 or (units * split <= device.compute_units * tile.residents and problem.k >= 512 * split):
            yield split


def decode_split(tile: Sm90DecodeTile, problem: Problem, device: Device) -> int:
    """The parts of K that end first, by what a program waits for its memory and what all of them read.

    In tiles of a program of four warps with eight tiles on their way, of which three keep an SM's memory busy.
    """
    blocks, tiles = cdiv(problem.n, 16 * tile.warps), cdiv(problem.k, TILE)

    def cost(split: int) -> float:
        mine = cdiv(tiles, split * tile.depth) * tile.depth
        an_sm = blocks * split / device.compute_units
        turns = max(an_sm / tile.residents, 1.0)
        waiting = turns * mine * 8 / tile.depth
        reading = (an_sm + (turns > 1)) * mine * tile.warps / 12  # a last one ends alone
        return max(waiting, reading) + (ADDING_TILES * turns if split > 1 else 0)  # every wave adds its parts

    splits = [split for split in (1, 2, 4, 8) if split <= max(1, tiles // tile.depth)]
    return min(splits, key=cost)


def sm90_limit(tile: Sm90DecodeTile | Sm90PrefillTile, problem: Problem, device: Device) -> str | None:
    """None when `tile` may run `problem` on `device`, else one sentence."""
    if device.arch != "sm90":
        return f"its instructions are those of sm90; this is {device.arch}"
    if tile.split_k < 1:
        return "split_k is settled by tuning rows alone: give a number of parts"
    return _decode_limit(tile, problem) if isinstance(tile, Sm90DecodeTile) else _prefill_limit(tile, device)


def _decode_limit(tile: Sm90DecodeTile, problem: Problem) -> str | None:
    if problem.m > 16:
        return f"m must be at most 16, not {problem.m}"
    if tile.warps not in (4, 8, 16):
        return f"warps must be 4, 8 or 16, not {tile.warps}"
    if tile.depth not in (2, 4, 8, 16):
        return f"depth must be 2, 4, 8 or 16, not {tile.depth}"
    if tile.split_k not in (1, 2, 4, 8):
        return f"split_k must be 1, 2, 4 or 8 (a cluster has at most {MOST_CLUSTER} programs), not {tile.split_k}"
    if not 2 <= tile.ring <= tile.slabs:
        return f"ring must be 2 to slabs ({tile.slabs}), not {tile.ring}"
    return None


def _prefill_limit(tile: Sm90PrefillTile, device: Device) -> str | None:
    if tile.block_m not in (8, 16, 32, 64, 96, 128, 160, 192, 256):
        return f"block_m must be a power of two of 8 to 256, or 96, 160 or 192, not {tile.block_m}"
    if tile.warpgroups not in (1, 2, 3):
        return f"warpgroups must be 1, 2 or 3, not {tile.warpgroups}"
    if tile.in_turn and tile.warpgroups == 1:
        return "in_turn needs two warpgroups or three, not 1"
    if tile.block_k not in (64, 128, 256) or tile.stages < 2 * tile.block_k // TILE:
        return f"block_k must be 64, 128 or 256 and the ring two of them: block_k={tile.block_k}, stages={tile.stages}"
    shared = sm90_shared_bytes(tile)
    if shared * tile.residents > device.shared_bytes:
        return f"{shared} bytes of shared memory x {tile.residents}, {device.arch} has {device.shared_bytes}"
    return None


def sm90_shared_bytes(tile: Sm90PrefillTile) -> int:
    """The ring (x, codes, scales and zero points of groups of 32, barriers) and the output on its way out."""
    weight = TILE * TILE // 2 + 2 * 256
    stage = 2 * TILE * tile.block_m + tile.warpgroups * weight + 16
    out = 0 if tile.split_k > 1 else 2 * TILE * tile.block_m * tile.warpgroups
    return tile.stages * stage + out + 1024
