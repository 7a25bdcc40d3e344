"""What the hot loop of a compiled kernel is made of, and what share of its issue cycles the matrix units get.

Matrix-issue share (RDNA only): cycles of the matrix instructions over the cycles of all instructions that issue on the
vector port, which are the matrix and the vector ones: a wave's WMMA keeps other waves of its SIMD from issuing VALU.
Scalar, LDS, memory, wait and branch instructions issue on ports of their own, from other waves, in the same cycles.
It is the most of the matrix peak that the loop can reach, with every latency hidden.

A hot loop within one group of K (constant GROUP), inside a loop over groups, is counted with what that loop adds: the
hot loop's trips and the rest of the outer loop's body. Where half of the waves feed the others (constant PRODUCERS), a
consumer's loop and its producer's are counted together, as if one wave ran both.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from .classes import CLASSES, MATRIX, VECTOR, classify, matrix_depth, matrix_share
from .compile import Compiled
from .listing import Instruction, Listing, parse_amdgcn, parse_sass
from .loops import Loop, find_loops, hot_loop
from .occupancy import occupancy, unit_of


@dataclass(frozen=True, kw_only=True)
class Isa:
    """The reading of one compiled kernel.

    looped        whether there is a loop; else `opcodes` counts the whole kernel
    trips         trips of the hot loop that `opcodes` counts, beside the rest of a loop over groups: 1 without one
    opcodes       instructions of one warp by opcode
    matrix_share  see above; None off RDNA, or without matrix instructions
    weights       weights of the program's tile that these instructions multiply; 0 without matrix instructions, or
                  where the launch does not name its tile (constants BLOCK_M and BLOCK_N)
    teams         warps of a program that multiply: all, but for producers
    waves, where  waves resident on one SIMD or SM, and which of the two
    """

    kernel: str
    arch: str
    looped: bool
    trips: int
    opcodes: Counter[str]
    matrix_share: float | None
    weights: int
    registers: int
    scalar_registers: int
    shared_bytes: int
    spills: int
    scratch_bytes: int
    warps: int
    teams: int
    lanes: int
    waves: int
    where: str

    @property
    def counts(self) -> dict[str, int]:
        """Instructions by class, in the order of CLASSES."""
        found = Counter(dict.fromkeys(CLASSES, 0))
        for opcode, count in self.opcodes.items():
            found[classify(opcode, self.arch)] += count
        return dict(found)

    @property
    def vector_per_weight(self) -> float | None:
        """Vector instructions that one lane spends on each weight it handles; None where `weights` is unknown."""
        return self.counts[VECTOR] * self.lanes * self.teams / self.weights if self.weights else None


def read_isa(compiled: Compiled) -> Isa:
    """Finds and counts the hot loop of a compiled kernel."""
    arch = compiled.arch
    listing = listing_of(compiled)
    trips, paths = hot_paths(compiled, listing)
    opcodes = Counter(i.opcode for path in paths or (listing.instructions,) for i in path)
    return Isa(
        kernel=compiled.name,
        arch=arch,
        looped=bool(paths),
        trips=trips,
        opcodes=opcodes,
        matrix_share=matrix_share(opcodes, arch),
        weights=_depth(opcodes, compiled) * compiled.launch.constants.get("BLOCK_N", 0),
        registers=compiled.registers,
        scalar_registers=compiled.scalar_registers,
        shared_bytes=compiled.shared_bytes,
        spills=compiled.spills,
        scratch_bytes=compiled.scratch_bytes,
        warps=compiled.warps,
        teams=_teams(compiled),
        lanes=compiled.lanes,
        waves=occupancy(arch, registers=compiled.registers, shared_bytes=compiled.shared_bytes, warps=compiled.warps),
        where=unit_of(arch).where,
    )


def listing_of(compiled: Compiled) -> Listing:
    parse = parse_amdgcn if compiled.arch.startswith("gfx") else parse_sass
    return parse(compiled.machine_code)


def hot_paths(compiled: Compiled, listing: Listing) -> tuple[int, tuple[tuple[Instruction, ...], ...]]:
    """Trips of the hot loop in a path, and the path of each kind of wave: one, or a consumer's and a producer's."""
    loop = hot_loop(listing, lambda opcode: classify(opcode, compiled.arch) == MATRIX)
    if loop is None:
        return 1, ()
    if compiled.launch.constants.get("PRODUCERS"):
        return _beside(loop, _filling(listing))
    around = [outer for outer in find_loops(listing) if outer.contains(loop)]
    depth = _depth(Counter(i.opcode for i in loop.instructions), compiled)
    group = compiled.launch.constants.get("GROUP", 0)
    if not around or not depth or not group or group % depth:
        return 1, (loop.instructions,)
    outer = min(around, key=lambda one: len(one.instructions))
    inside = set(map(id, loop.instructions))
    start = next(n for n, i in enumerate(outer.instructions) if id(i) in inside)
    after = tuple(i for i in outer.instructions[start:] if id(i) not in inside)
    trips = group // depth
    return trips, ((*outer.instructions[:start], *(trips * loop.instructions), *after),)


def _beside(hot: Loop, filling: Loop) -> tuple[int, tuple[tuple[Instruction, ...], ...]]:
    """As many trips of both as meet at the same barriers: LLVM may have unrolled one of them."""
    barriers = math.lcm(_barriers(hot), _barriers(filling))
    trips = barriers // _barriers(hot)
    return trips, (trips * hot.instructions, barriers // _barriers(filling) * filling.instructions)


def _filling(listing: Listing) -> Loop:
    """The loop of the waves that fill what others multiply; of an unrolled one and its remainder the former."""
    without = [loop for loop in find_loops(listing) if not any("wmma" in i.opcode for i in loop.instructions)]
    return max(without, key=_barriers)


def _barriers(loop: Loop) -> int:
    return sum(i.opcode == "s_barrier" for i in loop.instructions)


def _teams(compiled: Compiled) -> int:
    return compiled.warps // (2 if compiled.launch.constants.get("PRODUCERS") else 1)


def _depth(opcodes: Counter[str], compiled: Compiled) -> int:
    sizes = compiled.launch.constants
    if not {"BLOCK_M", "BLOCK_N"} <= sizes.keys():
        return 0
    block_m, block_n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    return matrix_depth(opcodes, compiled.arch, block_m=block_m, block_n=block_n, warps=_teams(compiled))
