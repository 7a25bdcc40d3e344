"""How many waves fit: registers and shared memory against what one SIMD (AMD) or SM (NVIDIA) has."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Unsupported


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What the waves of one scheduling unit share.

    where     the unit that `waves` counts on
    waves     most resident waves
    registers vector registers a wave's lanes may be cut from: one lane's share of the register file
    granule   registers are given in multiples of this
    shared    LDS or shared memory of `peers` such units, in bytes, with `reserved` bytes of it per program
    programs  most resident programs of those peers
    """

    where: str
    waves: int
    registers: int
    granule: int
    shared: int
    peers: int
    programs: int
    reserved: int = 0


# AMD: LLVM's AMDGPUBaseInfo.cpp (getTotalNumVGPRs, getVGPRAllocGranule): 1536 wave32 registers in granules of 24 with
# Feature1_5xVGPRs (gfx1100, gfx1101, gfx1151, gfx12), else 1024 in granules of 16; 16 waves a SIMD; a WGP has 4 SIMDs
# and 128 KiB of LDS. gfx90a and gfx94x: 512 wave64 registers in granules of 8, 8 waves a SIMD, 4 SIMDs and 64 KiB a CU.
_RDNA_FULL = Unit(where="SIMD", waves=16, registers=1536, granule=24, shared=128 * 1024, peers=4, programs=64)
_RDNA = Unit(where="SIMD", waves=16, registers=1024, granule=16, shared=128 * 1024, peers=4, programs=64)
_CDNA = Unit(where="SIMD", waves=8, registers=512, granule=8, shared=64 * 1024, peers=4, programs=32)


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 65536 registers an SM, given to
# warps in units of 256, and 1 KiB of shared memory reserved per block from sm_80 on.
def _sm(warps: int, shared_kib: int, blocks: int) -> Unit:
    return Unit(
        where="SM",
        waves=warps,
        registers=65536 // 32,
        granule=8,
        shared=shared_kib * 1024,
        peers=1,
        programs=blocks,
        reserved=1024,
    )


_UNITS = {
    "gfx1100": _RDNA_FULL,
    "gfx1101": _RDNA_FULL,
    "gfx1151": _RDNA_FULL,
    "gfx11": _RDNA,
    "gfx12": _RDNA_FULL,
    "gfx9": _CDNA,
    "sm80": _sm(64, 164, 32),
    "sm86": _sm(48, 100, 16),
    "sm89": _sm(48, 100, 24),
    "sm9": _sm(64, 228, 32),
    "sm10": _sm(64, 228, 32),
}


def unit_of(arch: str) -> Unit:
    """The scheduling unit of an architecture. Raises Unsupported for an unknown one."""
    for prefix in sorted(_UNITS, key=len, reverse=True):
        if arch.startswith(prefix):
            return _UNITS[prefix]
    raise Unsupported(f"occupancy of {arch} is unknown; codegen/occupancy.py knows {', '.join(_UNITS)}.")


def occupancy(arch: str, *, registers: int, shared_bytes: int, warps: int) -> int:
    """Waves resident on one unit when programs of `warps` waves fill it; whole programs only."""
    unit = unit_of(arch)
    given = -(-max(registers, 1) // unit.granule) * unit.granule
    waves = min(unit.waves, unit.registers // given) * unit.peers
    programs = min(unit.programs, waves // warps)
    if shared_bytes:
        programs = min(programs, unit.shared // (shared_bytes + unit.reserved))
    return -(-programs * warps // unit.peers)
