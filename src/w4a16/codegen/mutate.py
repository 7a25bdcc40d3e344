"""Mutation check: how many single-instruction changes in a kernel's assembly does executing it notice?"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from ..device import Device
from .compile import Compiled
from .gfx11.control import CONTROL
from .gfx11.faults import Fault, UnknownInstruction
from .gfx11.launch import execute
from .gfx11.machine import step_of
from .gfx11.program import parse_program
from .gfx11.table import TABLE
from .verify import MOST_FLIPPED, Call, Check, checks, compile_call, prepare

# Opcodes that one might mistake for each other; a mutant takes the other of a pair.
SIBLINGS = (
    ("v_add_nc_u32", "v_sub_nc_u32"),
    ("v_and_b32", "v_or_b32"),
    ("v_lshlrev_b32", "v_lshrrev_b32"),
    ("v_lshl_or_b32", "v_lshl_add_u32"),
    ("v_and_or_b32", "v_or3_b32"),
    ("v_add_f32", "v_sub_f32"),
    ("v_mul_f32", "v_add_f32"),
    ("v_pk_add_f16", "v_pk_mul_f16"),
    ("v_cmp_gt_i32", "v_cmp_ge_i32"),
    ("v_cmp_lt_i32", "v_cmp_le_i32"),
    ("s_add_i32", "s_sub_i32"),
    ("s_lshl_b32", "s_lshr_b32"),
    ("s_cbranch_scc0", "s_cbranch_scc1"),
    ("v_perm_b32", "v_alignbit_b32"),
    ("v_min_i32", "v_max_i32"),
    ("s_min_i32", "s_max_i32"),
    ("ds_load_u16_d16", "ds_load_u16_d16_hi"),
)
# They change time, or what the emulator does not model: waits, caches, hints.
_UNMODELLED = re.compile(
    r"s_waitcnt|s_delay_alu|s_clause|s_nop|buffer_gl|s_sendmsg|s_endpgm|s_set_inst|s_setprio|s_sleep"
)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """An assembly text that differs from a kernel's in one line."""

    text: str
    line: int
    old: str
    new: str


def mutants(text: str, seed: int) -> Iterator[Mutant]:
    """Random changes without end: a deleted instruction, another opcode, register or constant."""
    lines, chance = text.splitlines(), random.Random(seed)
    end = next(n for n, line in enumerate(lines) if line.startswith(".Lfunc_end"))
    body = [n for n in range(end) if re.match(r"\s+[svdgb]\w+_", lines[n]) and not _UNMODELLED.search(lines[n])]
    while True:
        n, change = chance.choice(body), chance.choice((_deleted, _sibling, _register, _constant))
        old = lines[n].split(";")[0].strip()
        new = change(old, chance)
        if new is not None and new != old:
            changed = "\n".join([*lines[:n], "\t" + new, *lines[n + 1 :]])
            if _assembles(changed):
                yield Mutant(text=changed, line=n + 1, old=old, new=new or "(deleted)")


def _deleted(line: str, _: random.Random) -> str | None:
    return None if line.startswith(("s_branch", "s_cbranch")) else ""


def _sibling(line: str, _: random.Random) -> str | None:
    name = re.sub(r"_e(32|64)$", "", line.split()[0])
    for pair in SIBLINGS:
        if name in pair:
            return line.replace(name, pair[1 - pair.index(name)], 1)
    return None


def _register(line: str, chance: random.Random) -> str | None:
    found = list(re.finditer(r"\b([vs])(\d+)\b", line))
    if not found:
        return None
    at = chance.choice(found)
    return f"{line[: at.start()]}{at[1]}{max(0, int(at[2]) + chance.choice((-1, 1)))}{line[at.end() :]}"


def _constant(line: str, chance: random.Random) -> str | None:
    found = list(re.finditer(r"(?<=[ :])(0x[0-9a-f]+|\d+)(?=,|\s|$)", line))
    if not found:
        return None
    at = chance.choice(found)
    return f"{line[: at.start()]}{int(at[1], 0) ^ 1 << chance.randrange(3):#x}{line[at.end() :]}"


def _assembles(text: str) -> bool:
    """Whether the emulator reads the text; what it cannot read an assembler would mostly refuse."""
    try:
        for instruction in parse_program(text).instructions:
            if instruction.mnemonic in TABLE or instruction.mnemonic in CONTROL or instruction.second:
                step_of(instruction)
    except (UnknownInstruction, IndexError, ValueError, KeyError):
        return False
    return True


def noticed(mutant: Mutant, which: int, call: Call, compiled: list[Compiled], bound: float, limit: int) -> str | None:
    """How executing launch `which` with the mutant's code shows the change; None when it does not."""
    call.reset()
    try:
        for n, code in enumerate(compiled):
            execute(code, mutant.text if n == which else None, limit)
    except (Fault, UnknownInstruction) as fault:
        return str(fault)
    error, flipped = call.error(), call.flipped()
    if not error <= bound:
        return f"relative error {error:.1e}"
    return f"{flipped:.1%} of the outputs are not the known bits" if flipped > MOST_FLIPPED else None


def mutation_check(device: Device, names: list[str], count: int, seed: int, show: Callable[[str], None]) -> int:
    """Mutates the largest launch of each kernel's first check, in each feed. The exit status: 1 where unchanged code
    fails.
    """
    for check in (check for name in names for check in _first_of_each_feed(device, name)):
        stem, caught, total = check.stem, 0, 0
        call = prepare(check, device)
        compiled = compile_call(call, device)
        which = max(range(len(compiled)), key=lambda n: len(compiled[n].asm["amdgcn"]))
        executed = sum(execute(code).executed for code in compiled)
        if not call.error() <= check.bound:
            show(f"{stem}: the unchanged code fails; see `w4a16 verify --kernel {stem}`.")
            return 1
        unchanged = call.out.clone()
        for mutant in islice(mutants(compiled[which].asm["amdgcn"], seed), count):
            why = noticed(mutant, which, call, compiled, check.bound, 4 * executed)
            total, caught = total + 1, caught + (why is not None)
            verdict = "caught  " if why else "SURVIVED"
            why = why or ("the same bits" if torch.equal(call.out, unchanged) else f"relative error {call.error():.1e}")
            show(f"{verdict} {stem} line {mutant.line}: {mutant.old} -> {mutant.new}  {why}")
        feed = f" feed={check.tile.feed}" if hasattr(check.tile, "feed") else ""
        show(f"{device.arch}: {stem}{feed}: {caught} of {total} changes noticed")
    return 0


def _first_of_each_feed(device: Device, stem: str) -> list[Check]:
    found: dict[str | None, Check] = {}
    for check in checks(device, stem):
        found.setdefault(getattr(check.tile, "feed", None), check)
    return list(found.values())
