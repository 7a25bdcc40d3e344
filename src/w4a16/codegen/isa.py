"""What the hot loop of a compiled kernel is made of, and what share of its issue cycles the matrix units get.

Matrix-issue share (RDNA only): cycles of the matrix instructions over the cycles of all instructions that issue on the
vector port, which are the matrix and the vector ones: a wave's WMMA keeps other waves of its SIMD from issuing VALU.
Scalar, LDS, memory, wait and branch instructions issue on ports of their own, from other waves, in the same cycles.
It is the most of the matrix peak that the loop can reach, with every latency hidden.

A hot loop within one group of K (constant GROUP), inside a loop over groups, is counted with what that loop adds: the
hot loop's trips and the rest of the outer loop's body.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .classes import CLASSES, MATRIX, VECTOR, classify, matrix_depth, matrix_share
from .compile import Compiled
from .listing import Listing, parse_amdgcn, parse_sass
from .loops import find_loops, hot_loop
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
        return self.counts[VECTOR] * self.lanes * self.warps / self.weights if self.weights else None


def read_isa(compiled: Compiled) -> Isa:
    """Finds and counts the hot loop of a compiled kernel."""
    arch = compiled.arch
    looped, trips, opcodes = _hot(listing_of(compiled), compiled)
    return Isa(
        kernel=compiled.name,
        arch=arch,
        looped=looped,
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
        lanes=compiled.lanes,
        waves=occupancy(arch, registers=compiled.registers, shared_bytes=compiled.shared_bytes, warps=compiled.warps),
        where=unit_of(arch).where,
    )


def listing_of(compiled: Compiled) -> Listing:
    parse = parse_amdgcn if compiled.arch.startswith("gfx") else parse_sass
    return parse(compiled.machine_code)


def _hot(listing: Listing, compiled: Compiled) -> tuple[bool, int, Counter[str]]:
    """Whether there is a hot loop, the trips of it that are counted, and the count."""
    loop = hot_loop(listing, lambda opcode: classify(opcode, compiled.arch) == MATRIX)
    if loop is None:
        return False, 1, Counter(i.opcode for i in listing.instructions)
    inner = Counter(i.opcode for i in loop.instructions)
    around = [outer for outer in find_loops(listing) if outer.contains(loop)]
    depth, group = _depth(inner, compiled), compiled.launch.constants.get("GROUP", 0)
    if not around or not depth or not group or group % depth:
        return True, 1, inner
    outer = min(around, key=lambda one: len(one.instructions))
    both = Counter(i.opcode for i in outer.instructions)
    trips = group // depth
    return True, trips, both + Counter({opcode: (trips - 1) * count for opcode, count in inner.items()})


def _depth(opcodes: Counter[str], compiled: Compiled) -> int:
    sizes = compiled.launch.constants
    if not {"BLOCK_M", "BLOCK_N"} <= sizes.keys():
        return 0
    block_m, block_n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    return matrix_depth(opcodes, compiled.arch, block_m=block_m, block_n=block_n, warps=compiled.warps)
