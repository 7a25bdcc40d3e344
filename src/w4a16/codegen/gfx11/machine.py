"""Runs a grid: waves that stand at one instruction execute it together, over as many workgroups as fit a batch."""

from __future__ import annotations

import itertools

import numpy as np

from . import (  # noqa: F401  (fill the table)
    compare,
    division,
    ds,
    global_memory,
    half,
    lanes,
    matrix,
    scalar,
    scalar_float,
    vector,
)
from .control import BARRIER, BRANCHES, CONTROL, END
from .faults import Fault, UnknownInstruction
from .lanes import with_dpp
from .lds import Lds, Meter
from .memory import Memory
from .program import Instruction, Program
from .state import LANES, Array, Gang
from .table import TABLE, Step, dual

BATCH_WAVES = 64  # registers of so many waves stay in a core's cache
LIMIT = 4_000_000  # wave-instructions of a batch, after which a loop is taken to be endless
KERNEL_ARGUMENTS = 0  # the SGPR pair that points to them


class Machine:
    """A program ready to run. `executed` counts wave-instructions."""

    def __init__(self, program: Program, limit: int = LIMIT, meter: Meter | None = None) -> None:
        self.program, self.limit, self.meter, self.executed = program, limit, meter, 0
        self._steps = [step_of(instruction) for instruction in program.instructions]

    def run(self, memory: Memory, arguments: int, grid: tuple[int, ...], waves: int, lds_bytes: int) -> None:
        """Every workgroup of the grid; `arguments` is the address of the kernel arguments."""
        x, y, z = (*grid, 1, 1)[:3]
        groups = [(i, j, k) for k, j, i in itertools.product(range(z), range(y), range(x))]
        size = max(1, BATCH_WAVES // waves)
        for start in range(0, len(groups), size):
            batch = np.array(groups[start : start + size])
            lds = Lds(len(batch), max(lds_bytes, self.program.lds_bytes), self.meter)
            wave = np.tile(np.arange(waves), len(batch))
            slot = np.repeat(np.arange(len(batch)), waves)
            gang = Gang(wave, slot, memory, lds, self.program.scratch_bytes, seed=start)
            self._initialise(gang, arguments, batch)
            with np.errstate(all="ignore"):  # infinities and NaN are values here
                self._run_batch(gang)

    def _initialise(self, gang: Gang, arguments: int, groups: Array) -> None:
        gang.s[KERNEL_ARGUMENTS], gang.s[KERNEL_ARGUMENTS + 1] = arguments & 0xFFFFFFFF, arguments >> 32
        register = self.program.user_sgprs
        for axis in range(3):
            if self.program.group_ids[axis]:
                gang.s[register] = groups[gang.groups, axis, None]
                register += 1
        gang.v[0] = gang.waves[:, None] * LANES + np.arange(LANES)

    def _run_batch(self, gang: Gang) -> None:
        budget = self.executed + self.limit
        ready = [gang]
        waiting: list[Gang] = []
        ended: list[Gang] = []
        while ready or waiting:
            if not ready:
                _check_barrier(waiting, ended)
                ready, waiting = _merged(waiting), []
                gang.lds.barrier()
            # The gang furthest behind runs until it meets another: branches that rejoin become one gang again.
            ready = _merged(ready)
            current = ready.pop(0)
            until = ready[0].pc if ready else len(self._steps)
            self._advance(current, until, budget)
            if current.pc == until and ready:
                ready.append(current)
                continue
            name = self.program.instructions[current.pc].mnemonic
            if name == BARRIER:
                current.pc += 1
                waiting.append(current)
            elif name == END:
                ended.append(current)
            elif name in BRANCHES:
                ready += self._branch(current, BRANCHES[name](current))
            else:
                ready.append(current)
        assert not waiting

    def _branch(self, gang: Gang, taken: Array) -> list[Gang]:
        target = self.program.instructions[gang.pc].target
        if taken.all() or not taken.any():
            gang.pc = target if taken.all() else gang.pc + 1
            return [gang]
        jumping, falling = gang.split(taken)
        jumping.pc, falling.pc = target, gang.pc + 1
        return [falling, jumping]

    def _advance(self, gang: Gang, until: int, budget: int) -> None:
        """Straight on to the next control instruction that ends, splits or waits, or to `until`."""
        steps, instructions = self._steps, self.program.instructions
        try:
            while gang.pc < until:
                step = steps[gang.pc]
                self.executed += gang.count
                if self.executed > budget:
                    raise Fault(f"no end after {self.limit} wave-instructions")
                if step is None:
                    instruction = instructions[gang.pc]
                    if instruction.mnemonic in (BARRIER, END):
                        return
                    if instruction.mnemonic in BRANCHES:
                        taken = BRANCHES[instruction.mnemonic](gang)
                        if taken.any() and not taken.all():
                            return
                        gang.pc = instruction.target if taken.any() else gang.pc + 1
                    else:
                        gang.pc = instruction.target
                else:
                    step(gang)
                    gang.pc += 1
        except Fault as fault:
            line = instructions[gang.pc].text
            raise Fault(f"instruction {gang.pc} `{line}`: {fault}.") from None


def step_of(instruction: Instruction) -> Step | None:
    """What the instruction does, None for control flow."""
    name = instruction.mnemonic
    if instruction.second is not None:
        return dual(instruction, instruction.second)
    if name in CONTROL:
        return None
    if name not in TABLE:
        raise UnknownInstruction(f"{instruction.text!r}: {name} is unknown to the gfx11 emulator.")
    step = TABLE[name](instruction)
    uses_dpp = len(instruction.operands) > 1 and instruction.operands[1].source_lanes is not None
    return with_dpp(instruction, step) if uses_dpp else step


def _merged(gangs: list[Gang]) -> list[Gang]:
    """In the order of their program counters, those at one instruction joined."""
    found: list[Gang] = []
    for gang in sorted(gangs, key=lambda g: g.pc):
        if found and found[-1].pc == gang.pc:
            found[-1].join(gang)
        else:
            found.append(gang)
    return found


def _check_barrier(waiting: list[Gang], ended: list[Gang]) -> None:
    at_barrier = {int(group) for gang in waiting for group in gang.groups}
    gone = {int(group) for gang in ended for group in gang.groups}
    if at_barrier & gone:
        raise Fault("some waves of a workgroup ended, others wait at a barrier.")
