"""Runs a few lines of gfx11 assembly in the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from w4a16.codegen.gfx11.launch import Execution
from w4a16.codegen.gfx11.lds import Lds
from w4a16.codegen.gfx11.machine import Machine, step_of
from w4a16.codegen.gfx11.memory import Memory
from w4a16.codegen.gfx11.program import Program, parse_program
from w4a16.codegen.gfx11.state import EXEC, Gang

TEMPLATE = """
kernel:
{code}
	s_endpgm
.Lfunc_end0:
	.amdhsa_group_segment_fixed_size {lds}
	.amdhsa_private_segment_fixed_size 64
	.amdhsa_kernarg_size 16
	.amdhsa_user_sgpr_count 2
	.amdhsa_user_sgpr_kernarg_segment_ptr 1
	.amdhsa_wavefront_size32 1
	.amdhsa_system_sgpr_workgroup_id_x 1
"""
RANDOM = np.random.default_rng(3)


def program(code: str, lds: int = 256) -> Program:
    return parse_program(TEMPLATE.format(code=code, lds=lds))


def words(count: int = 2) -> np.ndarray:
    """Random uint32 [waves, 32]."""
    return RANDOM.integers(0, 1 << 32, (count, 32), dtype=np.uint32)


def floats(count: int = 2) -> np.ndarray:
    """Random fp32 of moderate size as uint32 [waves, 32]."""
    return (RANDOM.standard_normal((count, 32)) * 8).astype(np.float32).view(np.uint32)


def halves(count: int = 2) -> np.ndarray:
    """Two random fp16 in each uint32 [waves, 32]."""
    return (RANDOM.standard_normal((count, 64)) * 4).astype(np.float16).view(np.uint32)


def step(
    code: str,
    *,
    v: dict[int, Any] | None = None,
    s: dict[int, int] | None = None,
    active: int = 0xFFFFFFFF,
    waves: int = 2,
) -> Gang:
    """Straight-line code on waves of one workgroup with these registers; the gang afterwards."""
    memory = Memory()
    memory.freeze()
    gang = Gang(np.arange(waves), np.zeros(waves, np.int64), memory, Lds(1, 256), 64, seed=1)
    gang.write_scalar(EXEC, np.full((waves, 1), active, np.uint32))
    for index, value in (v or {}).items():
        gang.v[index] = value
    for index, word in (s or {}).items():
        gang.s[index] = word
    for instruction in program(code).instructions[:-1]:
        plain = step_of(instruction)
        assert plain is not None
        with np.errstate(all="ignore"):
            plain(gang)
    return gang


def run(
    code: str, *, waves: int = 1, groups: int = 1, out_words: int = 64, lds: int = 256
) -> tuple[np.ndarray, Execution]:
    """A whole kernel: s[0:1] points to the address of a zeroed buffer of `out_words`; gives the buffer."""
    memory = Memory()
    out = memory.reserve(np.zeros(4 * out_words, np.uint8))
    segment = memory.reserve(np.array([out, 0], np.uint64).view(np.uint8))
    memory.allow("out", out, 4 * out_words)
    memory.allow("arguments", segment, 16)
    memory.freeze()
    machine = Machine(program(code, lds), limit=100_000)
    machine.run(memory, segment, (groups,), waves, lds)
    return memory.contents(out, 4 * out_words).view(np.uint32), Execution(executed=machine.executed)
