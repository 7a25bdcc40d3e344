"""What part of the time a SIMD's vector port works: the waves that it holds, walked through their hot loops.

A wave issues in order, at most an instruction a cycle. WMMA and VALU share the port; LDS serves one access after the
other; what it loads is back after a latency; s_waitcnt and s_barrier are those of the code. Of the waves that could
issue, the oldest does: the last bits of a wave's priority are its age (AMD, "RDNA3 Instruction Set Architecture",
S_SETPRIO), and LLVM's AMDGPUSetWavePriority is there because older waves go first. So waves of one program stand at a
barrier together, and those of others fill the gap, if there are any.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field

from .classes import MATRIX, classify, vector_port_cycles
from .listing import Instruction

GLOBAL_LATENCY, SHARED_LATENCY = 500, 64  # cycles
CYCLES = 200_000  # walked; the first quarter, in which waves fall out of step, does not count


@dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction: cycles on the vector port or of LDS, and what it waits for.

    holds  cycles after which the wave itself may issue again: of WMMA all of them
    left   outstanding loads that s_waitcnt allows, from global memory and from LDS; None: it does not wait for them
    """

    port: int = 0
    holds: int = 1
    shared: float = 0.0
    load: bool = False
    barrier: bool = False
    left: tuple[int | None, int | None] = (None, None)


Walk = tuple[Step, ...]


def step_of(instruction: Instruction, arch: str, shared: float) -> Step:
    """`shared`: the cycles of LDS that it takes."""
    opcode = instruction.opcode
    port = sum(vector_port_cycles(Counter([opcode]), arch))
    waits = dict(re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", instruction.text))
    return Step(
        port=port,
        holds=port if classify(opcode, arch) == MATRIX else 1,
        shared=shared,
        load=opcode.startswith(("buffer_load", "global_load")),
        barrier=opcode == "s_barrier",
        left=(_number(waits.get("vmcnt")), _number(waits.get("lgkmcnt"))),
    )


def _number(digits: str | None) -> int | None:
    return None if digits is None else int(digits)


@dataclass(kw_only=True)
class _Wave:
    walk: Walk
    program: int
    ready: float
    at: int = 0
    loads: list[float] = field(default_factory=list)  # when each is back
    reads: list[float] = field(default_factory=list)

    def start(self, port_free: float, shared_free: float) -> float:
        """The first cycle in which its next instruction may issue."""
        step = self.walk[self.at]
        first = self.ready
        for pending, left in zip((self.loads, self.reads), step.left, strict=True):
            if left is not None and len(pending) > left:
                first = max(first, *pending[: len(pending) - left])
        if step.port:
            return max(first, port_free)
        return max(first, shared_free) if step.shared else first


@functools.lru_cache(maxsize=64)
def port_use(walks: tuple[Walk, ...], each: int, programs: int) -> float:
    """A SIMD holds `programs` programs, `each` waves of every walk of each of them; they go round forever."""
    work = each * sum(step.port for walk in walks for step in walk)
    waves = [
        _Wave(walk=walk, program=program, ready=program * work / programs)
        for program in range(programs)
        for walk in walks
        for _ in range(each)
    ]
    going, standing = list(waves), [list[_Wave]() for _ in range(programs)]  # by age; those at a barrier
    now = port_free = shared_free = worked = 0.0
    before: tuple[float, float] | None = None
    while now < CYCLES:
        if before is None and now > CYCLES / 4:
            before = now, worked
        now, wave = min(((w.start(port_free, shared_free), w) for w in going), key=lambda pair: pair[0])
        step = wave.walk[wave.at]
        for pending, left in zip((wave.loads, wave.reads), step.left, strict=True):
            if left is not None:
                del pending[: max(0, len(pending) - left)]
        wave.ready = now + step.holds
        wave.at = (wave.at + 1) % len(wave.walk)
        if step.port:
            port_free = now + step.port
            worked += step.port
        elif step.shared:
            shared_free = now + step.shared
            wave.reads.append(shared_free + SHARED_LATENCY)
        if step.load:
            wave.loads.append(now + GLOBAL_LATENCY)
        if step.barrier:
            there = standing[wave.program]
            there.append(wave)
            going.remove(wave)
            if len(there) == each * len(walks):
                for other in there:
                    other.ready = max(w.ready for w in there)
                going = [w for w in waves if w in going or w in there]
                there.clear()
    assert before is not None
    return (worked - before[1]) / (now - before[0])
