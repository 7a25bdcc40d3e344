"""Tiles of sm90_moe, and what Hopper's registers and shared memory allow of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..device import Device
from ..layouts.sm90 import TILE
from ..problem import Problem
from .sm90_tiles import Sm90DecodeTile, cdiv, group_of_tiles, sm90_limit

NARROW, WIDE = (1, 8, 16), (32, 64, 96, 128)  # slots a block: by mma.sync, by wgmma
MOST_TILES_AT_ONCE = 16  # four registers each
LEAST_RING = 3  # one that a consumer holds, the next that it waits for, and one more, without which that is not told of


@dataclass(frozen=True, kw_only=True)
class Sm90MoeTile:
    """One program computes [block_m, 128] of a gated product, or [block_m, 256] of another, at a time.

    block_m       slots a block of one expert has at most. 1: slots are not sorted. 1, 8 and 16 take mma.sync; 32, 64,
                  96 and 128 take wgmma, a block with fewer rows a narrower product
    stages        tiles of x and of codes, 64 columns each, in the ring (wgmma); two fill and empty as one where they
                  share their groups, those of 128 columns and more
    residents     programs an SM holds at a time (wgmma)
    warpgroups    of consumers (wgmma): 2 of two tiles of W each, or 4 of one, which hold up to 96 rows
    gemm1, gemm2  the tiles of mma.sync
    parts         for blocks of 1 in gated layers without act-order: warps that share K of gemm1, in programs that
                  ask for all of their codes at their start (sm90_moe_few); 0: gemm1 and gemm2 serve these too
    registers     with parts: of a thread of gemm2, which decide where its programs find room; 0: as many as it needs
    """

    block_m: int
    stages: int = 6
    residents: int = 1
    warpgroups: int = 2
    gemm1: Sm90DecodeTile | None = None
    gemm2: Sm90DecodeTile | None = None
    parts: int = 0
    registers: int = 0

    def __post_init__(self) -> None:
        for name in ("gemm1", "gemm2"):
            given = getattr(self, name)
            if isinstance(given, Mapping):  # of a tuning row
                object.__setattr__(self, name, Sm90DecodeTile(**given))

    @property
    def gemms(self) -> tuple[Sm90DecodeTile, Sm90DecodeTile] | None:
        """The tiles of mma.sync; None where wgmma computes."""
        if self.block_m not in NARROW or self.gemm1 is None or self.gemm2 is None:
            return None
        return self.gemm1, self.gemm2


def sm90_moe_limit(tile: Sm90MoeTile, problem: Problem, device: Device) -> str | None:
    """None when `tile` may run `problem` on `device`, else one sentence."""
    if device.arch != "sm90":
        return f"its instructions are those of sm90; this is {device.arch}"
    if tile.registers and not tile.parts:
        return f"registers go with parts: registers={tile.registers}, parts=0"
    if tile.block_m in NARROW:
        if tile.gemms is None:
            return f"blocks of {tile.block_m} slots need gemm1 and gemm2, the tiles of mma.sync"
        if tile.parts and (why := _few_limit(tile, problem)):
            return why
        block = replace(problem, m=tile.block_m)
        return next(filter(None, (sm90_limit(each, block, device) for each in tile.gemms)), None)
    if tile.block_m not in WIDE:
        return f"block_m must be one of {', '.join(map(str, NARROW + WIDE))}, not {tile.block_m}"
    if tile.stages < (least := max(4, LEAST_RING * _deep(problem))):
        return f"stages must be at least {least}, not {tile.stages}"
    if tile.residents != 1 and (tile.residents, tile.block_m) != (2, 32):
        return f"residents must be 1, or 2 for blocks of 32, not {tile.residents} for blocks of {tile.block_m}"
    if tile.residents == 2 and problem.group < 2 * TILE:  # more scales would spill
        return f"residents must be 1 in groups of less than {2 * TILE}, not 2 in groups of {problem.group}"
    blocks = {2: (32, 64, 128), 4: (32, 64, 96)}.get(tile.warpgroups, ())
    if tile.block_m not in blocks or (tile.warpgroups, tile.residents) == (4, 2):
        return f"warpgroups must be 2, or 4 for blocks of up to 96, not {tile.warpgroups} for blocks of {tile.block_m}"
    shared = sm90_moe_shared_bytes(tile, problem) * tile.residents
    return None if shared <= device.shared_bytes else f"{shared} bytes of shared memory, not {device.shared_bytes}"


def _few_limit(tile: Sm90MoeTile, problem: Problem) -> str | None:
    if tile.block_m != 1 or tile.parts not in (4, 8):
        return f"parts must be 4 or 8 and are for blocks of 1: parts={tile.parts}, block_m={tile.block_m}"
    tiles = max(2 * cdiv(cdiv(problem.k, TILE), tile.parts), cdiv(problem.n // 2, TILE))
    if tiles > MOST_TILES_AT_ONCE:
        return f"a thread asks for words of {tiles} tiles at its start, at most {MOST_TILES_AT_ONCE}"
    return None


def tiles_a_step(group: int) -> int:
    """How many tiles along K fill a stage of the ring at once: two where both are of one group.

    group: as `group_of_tiles` gives it
    """
    return 2 if group % (2 * TILE) == 0 else 1


def _deep(problem: Problem) -> int:
    """`tiles_a_step` of the first GEMM."""
    return tiles_a_step(group_of_tiles(problem.group, problem.k))


def sm90_moe_shared_bytes(tile: Sm90MoeTile, problem: Problem) -> int:
    """What the larger GEMM takes: the ring (x, codes, scales and zero points, barriers), and output on its way out.

    With four warpgroups, gated, that is two tiles in the activation's dtype and their two up tiles in fp32.
    """
    room = min(tile.block_m, TILE)
    size = 4 if problem.group == 32 else 2  # bytes of a number of the second GEMM's output; of the first's, 2
    # Where a group is all of K, the second GEMM's may be an odd number of tiles.
    second = 1 if problem.group == problem.k else _deep(problem)
    if tile.warpgroups == 2:
        return _ring_bytes(tile, problem, second) + 2 * size * TILE * tile.block_m + 768
    gated = _ring_bytes(tile, problem, _deep(problem)) + 4 * TILE * room + 8 * TILE * tile.block_m
    plain = _ring_bytes(tile, problem, second) + 4 * size * TILE * room
    return max(gated, plain) + 768


def _ring_bytes(tile: Sm90MoeTile, problem: Problem, deep: int) -> int:
    scales = 4 * TILE * (3 if problem.has_zeros else 2) * (2 if problem.group == 32 else 1)
    step = deep * (2 * TILE * tile.block_m + 4 * TILE * TILE // 2) + scales + 16
    return tile.stages // deep * step
