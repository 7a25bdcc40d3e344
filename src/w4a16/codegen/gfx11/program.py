"""AMD assembly text to a Program: instructions, kernel descriptor and the layout of the kernel arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .faults import UnknownInstruction
from .operands import Operand, parse_operand

LANES = 32
_LABEL = re.compile(r"^([.$\w]+):")
_ENCODING = re.compile(r"(_e32|_e64)?(_dpp)?$")
_MODIFIER = re.compile(
    r"(?:(?<=\s)|^)(offset[01]?:-?\w+|offen|glc|slc|dlc|clamp|quad_perm:\[[\d,]+\]"
    r"|row_(?:shr|shl|ror|xmask|share|mask):\w+|row_mirror|row_half_mirror|bank_mask:\w+|bound_ctrl:\d|fi:\d"
    r"|op_sel:\[[\d,]+\]|op_sel_hi:\[[\d,]+\]|neg_lo:\[[\d,]+\]|neg_hi:\[[\d,]+\])(?=\s|$)"
)
_FREE_TEXT = ("s_waitcnt", "s_delay_alu", "s_sendmsg", "s_clause", "s_nop", "s_sleep", "s_setprio", "s_set_inst")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """mnemonic  without the suffixes of its encoding
    modifiers  by name: an integer, a list of integers, or True
    target     the index that a branch goes to
    second     the other half of a dual issue
    """

    mnemonic: str
    operands: tuple[Operand, ...]
    modifiers: dict[str, Any]
    text: str
    target: int = -1
    second: Instruction | None = None

    def flag(self, name: str, source: int, default: int = 0) -> bool:
        """One bit of op_sel and its kin."""
        given = self.modifiers.get(name, [])
        return bool(given[source] if source < len(given) else default)


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One kernel argument: its place in the segment, and whether it is a pointer."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Program:
    instructions: tuple[Instruction, ...]
    arguments: tuple[Argument, ...]
    argument_bytes: int
    lds_bytes: int
    scratch_bytes: int
    user_sgprs: int  # the workgroup ids follow them: at s2 on gfx1151, at s14 or s15 on gfx1100
    group_ids: tuple[bool, bool, bool]  # whether x, y, z are passed


def parse_program(text: str) -> Program:
    """The one kernel of an assembly file as Triton prints it."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.split(";")[0].split("//")[0].rstrip()
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
            if label[1].startswith(".Lfunc_end"):
                break
        elif line.strip() and not line.strip().startswith("."):
            code.append(line.strip())
    _check_launch(text)
    return Program(
        instructions=tuple(_instruction(line, labels) for line in code),
        arguments=tuple(_arguments(text)),
        argument_bytes=_directive(text, "kernarg_size"),
        lds_bytes=_directive(text, "group_segment_fixed_size"),
        scratch_bytes=_directive(text, "private_segment_fixed_size"),
        user_sgprs=_directive(text, "user_sgpr_count"),
        group_ids=tuple(bool(_directive(text, f"system_sgpr_workgroup_id_{axis}")) for axis in "xyz"),  # type: ignore
    )


def _directive(text: str, name: str, default: int = 0) -> int:
    found = re.search(rf"\.amdhsa_{name} (\d+)", text)
    return int(found[1]) if found else default


def _check_launch(text: str) -> None:
    if not _directive(text, "wavefront_size32"):
        raise UnknownInstruction("the kernel is compiled for wave64, wanted wave32.")
    others = ("dispatch_ptr", "queue_ptr", "dispatch_id", "private_segment_size", "kernarg_preload_length")
    used = [name for name in others if _directive(text, f"user_sgpr_{name}")]
    if used or not _directive(text, "user_sgpr_kernarg_segment_ptr"):
        raise UnknownInstruction(f"user SGPRs: got {used or 'no'} besides kernarg_segment_ptr, wanted that alone.")


def _arguments(text: str) -> list[Argument]:
    listed = text.split(".args:", 1)[1].split(".group_segment_fixed_size", 1)[0] if ".args:" in text else ""
    fields = ("offset", "size", "value_kind")
    columns = [re.findall(rf"\.{field}:\s+(\w+)", listed) for field in fields]
    return [Argument(offset=int(o), size=int(s), kind=k) for o, s, k in zip(*columns, strict=True)]


def _instruction(text: str, labels: dict[str, int]) -> Instruction:
    parts = [_one(part.strip(), labels) for part in text.split("::")]
    return parts[0] if len(parts) == 1 else replace(parts[0], second=parts[1], text=text)


def _one(text: str, labels: dict[str, int]) -> Instruction:
    name, _, rest = text.partition(" ")
    encoding = _ENCODING.search(name)
    mnemonic = name[: encoding.start()] if encoding else name
    if mnemonic.startswith(_FREE_TEXT):
        return Instruction(mnemonic=mnemonic, operands=(), modifiers={}, text=text)
    if mnemonic.startswith(("s_branch", "s_cbranch")):
        return Instruction(mnemonic=mnemonic, operands=(), modifiers={}, text=text, target=labels[rest.strip()])
    modifiers = dict(_modifier(found[1]) for found in _MODIFIER.finditer(rest))
    plain = _MODIFIER.sub("", rest)
    pieces = [piece.strip() for piece in re.split(r",(?![^\[(]*[\])])", plain) if piece.strip()]
    if odd := [piece for piece in pieces if " " in piece]:
        raise UnknownInstruction(f"modifier in {text!r}: {odd[0]!r} is unknown to the gfx11 emulator.")
    operands = [parse_operand(piece) for piece in pieces]
    if encoding and encoding[2]:
        operands[1] = replace(operands[1], source_lanes=_source_lanes(modifiers, text)[0])
    return Instruction(mnemonic=mnemonic, operands=tuple(operands), modifiers=modifiers, text=text)


def _modifier(text: str) -> tuple[str, Any]:
    name, _, value = text.partition(":")
    if not value:
        return name, True
    return name, [int(item) for item in value[1:-1].split(",")] if value[0] == "[" else int(value, 0)


def _source_lanes(modifiers: dict[str, Any], text: str) -> tuple[Any, Any]:
    """For a DPP instruction: the lane that each lane reads, and whether that lane exists."""
    lane = np.arange(LANES)
    column, exists = lane & 15, np.ones(LANES, bool)
    if "row_shr" in modifiers:
        source = column - modifiers["row_shr"]
        exists = source >= 0
    elif "row_shl" in modifiers:
        source = column + modifiers["row_shl"]
        exists = source < 16
    elif "row_ror" in modifiers:
        source = column - modifiers["row_ror"]
    elif "row_xmask" in modifiers:
        source = column ^ modifiers["row_xmask"]
    elif "row_share" in modifiers:
        source = np.full(LANES, modifiers["row_share"])
    elif "row_mirror" in modifiers:
        source = 15 - column
    elif "row_half_mirror" in modifiers:
        source = column & 8 | 7 - (column & 7)
    elif "quad_perm" in modifiers:
        source = column & 12 | np.array(modifiers["quad_perm"])[column & 3]
    else:
        raise UnknownInstruction(f"{text!r}: its DPP control is unknown to the gfx11 emulator.")
    return lane & 16 | source & 15, exists


def dpp_lanes(instruction: Instruction) -> tuple[Any, Any, Any]:
    """Source lane, whether it exists, and whether row_mask and bank_mask let the lane be written."""
    source, exists = _source_lanes(instruction.modifiers, instruction.text)
    lane = np.arange(LANES)
    rows, banks = (instruction.modifiers.get(name, 15) for name in ("row_mask", "bank_mask"))
    return source, exists, (rows >> (lane >> 4) & banks >> (lane >> 2 & 3) & 1).astype(bool)
