"""Classes of machine instructions, and the cycles that RDNA's vector port spends on them."""

from __future__ import annotations

import re
from collections import Counter

CLASSES = ("matrix", "vector", "shared", "memory", "scalar", "wait", "branch")
MATRIX, VECTOR, SHARED, MEMORY, SCALAR, WAIT, BRANCH = CLASSES

# The first pattern that an opcode begins with names its class.
_AMD_CLASSES = (
    (r"v_wmma|v_swmmac|v_mfma|v_smfmac", MATRIX),
    (r"v_", VECTOR),
    (r"ds_", SHARED),
    (r"buffer_gl[01]_|buffer_inv|buffer_wb|global_inv|global_wb", WAIT),  # caches, around a barrier
    (r"global_|buffer_|flat_|scratch_|image_", MEMORY),
    (r"s_wait|s_barrier|s_delay_alu|s_nop|s_sleep|s_clause|s_sched|s_set_inst_prefetch|s_sethalt", WAIT),
    (r"s_branch|s_cbranch|s_endpgm|s_setpc|s_swappc|s_call", BRANCH),
    (r"s_", SCALAR),
)
_SASS_CLASSES = (
    (r"[HIQDBO]G?MMA|UTC[A-Z]*MMA", MATRIX),
    (r"LDS|STS|LDSM|STSM|ATOMS|SYNCS|STAS|REDAS", SHARED),
    (r"LDGDEPBAR|DEPBAR|BAR|WARPGROUP|WARPSYNC|MEMBAR|FENCE|NANOSLEEP|ERRBAR|NOP|YIELD|CCTL|UCGABAR|ACQBULK", WAIT),
    (r"LDC", SCALAR),
    (r"LD|ST|RED|ATOM|UBLK|UTMA", MEMORY),
    (r"BRA|BRX|JMP|EXIT|RET|CALL|BSSY|BSYNC|BREAK|BMOV", BRANCH),
    (r"U|R2UR|S2UR|S2R|CS2R", SCALAR),
    (r"", VECTOR),
)

# Cycles on RDNA3's vector port. WMMA: 2 x 16^3 FLOP at 512 FLOP a cycle and CU of two SIMDs ("How to accelerate AI
# applications on RDNA 3 using WMMA", GPUOpen); RDNA4 has twice that rate. Transcendentals and 32-bit integer multiplies
# run at a quarter of the rate (LLVM's SISchedule.td: WriteTrans32, WriteIntMul); a dual issue is one cycle.
_WMMA_CYCLES = {"gfx11": 32, "gfx12": 16}
_QUARTER_RATE = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_|v_mul_(lo|hi)_|v_mad_co|v_mad_[iu]64")


def classify(opcode: str, arch: str) -> str:
    table = _AMD_CLASSES if arch.startswith("gfx") else _SASS_CLASSES
    return next(kind for pattern, kind in table if re.match(pattern, opcode))


def vector_port_cycles(opcodes: Counter[str], arch: str) -> tuple[int, int]:
    """Cycles of RDNA's vector port that matrix instructions and all others take."""
    wmma = _WMMA_CYCLES[arch[:5]]
    matrix = vector = 0
    for opcode, count in opcodes.items():
        kind = classify(opcode, arch)
        if kind == MATRIX:
            matrix += count * (wmma // 2 if "_iu4" in opcode else wmma)
        elif kind == VECTOR:
            vector += count * (4 if _QUARTER_RATE.match(opcode) else 1)
    return matrix, vector


def matrix_share(opcodes: Counter[str], arch: str) -> float | None:
    """The matrix-issue share (see isa.py); None off RDNA, or without matrix instructions."""
    if arch[:5] not in _WMMA_CYCLES:
        return None
    matrix, vector = vector_port_cycles(opcodes, arch)
    return matrix / (matrix + vector) if matrix else None


# Rows, columns and depth of a matrix instruction; HGMMA is one of four warps, every other of one.
_MATRIX_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(16|8)")


def matrix_depth(opcodes: Counter[str], arch: str, *, block_m: int, block_n: int, warps: int) -> int:
    """Columns of K that a program multiplies with these instructions of each warp; 0 without matrix instructions.

    Taken for granted: no two warps multiply the same, up to one matrix instruction a warp (MFMA tiles of few rows
    break that).
    """
    multiplied, tiles = 0, 1
    for opcode, count in opcodes.items():
        found = _MATRIX_SHAPE.search(opcode) if classify(opcode, arch) == MATRIX else None
        if found:
            rows, columns, depth = (int(size) for size in found.groups() if size)
            sharers = 4 if opcode.startswith("HGMMA") else 1
            tiles = max(1, block_m * block_n * sharers // (rows * columns))
            multiplied += count * rows * columns * depth // sharers
    return multiplied * min(warps, tiles) // (block_m * block_n)
