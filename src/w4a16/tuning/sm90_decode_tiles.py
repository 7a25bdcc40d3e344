"""How sm90_decode shares K among its programs, and how these spread over the SMs."""

from __future__ import annotations

from dataclasses import replace

from ..device import Device
from ..layouts.sm90 import TILE
from ..problem import Problem
from .sm90_tiles import Sm90DecodeTile, cdiv, decode_share

SM_SHARED_KIB = 228
ADDING_TILES = 4  # what adding the parts of a cluster takes, in tiles of 64 x 64 a program reads: 1 to 1.5 us
LEAST_TILES = 4  # a program has
MOST_RESIDENTS = 32  # of any program


def decode_split(tile: Sm90DecodeTile, problem: Problem, device: Device) -> int:
    """The programs of a cluster that end first, by what one waits for its memory and what all of them read.

    In tiles of a program of four warps with eight tiles on their way, of which three keep an SM's memory busy.
    """
    blocks, tiles = cdiv(problem.n, tile.rows), cdiv(cdiv(problem.k, TILE), tile.parts)

    def cost(split: int) -> float:
        share = decode_share(replace(tile, split_k=split), problem.k, problem.group)
        mine = share if share <= tile.depth else cdiv(share, tile.depth) * tile.depth
        an_sm = blocks * split / device.compute_units
        turns = max(an_sm / tile.residents, 1.0)
        waiting = turns * mine * 8 / tile.depth
        reading = (an_sm + (turns > 1)) * mine * tile.warps / 12  # a last one ends alone
        return max(waiting, reading) + (ADDING_TILES if split > 1 else 0)

    most = min(tiles // LEAST_TILES, device.compute_units * tile.residents // blocks)  # parts: of one wave
    return min([split for split in (1, 2, 4, 8) if split <= max(1, most)], key=cost)


def settled(tile: Sm90DecodeTile, problem: Problem, device: Device) -> Sm90DecodeTile:
    """The tile with K in as many parts as end first, and where one wave is enough no more programs on an SM than
    spread over all SMs evenly.

    Room for more is taken by programs of the next launch, which then lie crowded on some SMs. Clusters need room for
    one more: they wait for that of all their programs, in one neighbourhood of SMs.
    """
    split = tile.split_k or decode_split(tile, problem, device)
    held = cdiv(cdiv(problem.n, tile.rows) * split, device.compute_units) + (split > 1)
    even = held <= tile.residents < MOST_RESIDENTS  # a tile that is settled stays as it is
    return replace(tile, split_k=split, residents=held if even else MOST_RESIDENTS)


def decode_spare_kib(tile: Sm90DecodeTile, shared: int) -> int:
    """What a program takes of shared memory beside what it uses, so that an SM holds no more than `residents`."""
    return max(0, SM_SHARED_KIB // (tile.residents + 1) - shared // 1024)  # an SM takes 1 KiB more of each program
