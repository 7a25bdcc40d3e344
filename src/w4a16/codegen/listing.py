"""Assembly text to instructions: AMD's as LLVM prints it, NVIDIA's SASS as nvdisasm does."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """opcode  without encoding suffixes; a dual issue joins its two by "+"
    targets  the labels it may jump to
    falls    whether the next instruction may follow it
    text     as the assembler printed it
    """

    opcode: str
    targets: tuple[str, ...]
    falls: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One kernel's instructions in order, and the index that each label stands before."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_AMD_LABEL = re.compile(r"^([.$\w]+):")
_AMD_ENCODING = re.compile(r"_(e32|e64|dpp|sdwa|e64_dpp)$")
_SASS_LABEL = re.compile(r"^(\.L_\w+):")
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_SASS_BRANCH = re.compile(r"`\((\.L_\w+)\)")
_SASS_TABLE = re.compile(r'"BRANCH_TARGETS ([^"]+)"')


def parse_amdgcn(text: str) -> Listing:
    """The code of the one kernel in an AMD assembly file: from its first label to the end of its function."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        code = line.split(";")[0].split("//")[0].rstrip()
        label = _AMD_LABEL.match(code)
        if label:
            if label[1].startswith(".Lfunc_end"):
                break
            labels[label[1]] = len(instructions)
        elif code.strip() and not code.strip().startswith("."):
            instructions.append(_amd(code.strip()))
    return Listing(instructions=tuple(instructions), labels=labels)


def _amd(text: str) -> Instruction:
    names = [_AMD_ENCODING.sub("", part.split()[0]) for part in text.split("::")]
    opcode = "+".join([names[0], *(name.removeprefix("v_dual_") for name in names[1:])])
    jumps = opcode.startswith(("s_branch", "s_cbranch"))
    return Instruction(
        opcode=opcode,
        targets=(text.split()[-1],) if jumps else (),
        falls=opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
        text=text,
    )


def parse_sass(text: str) -> Listing:
    """The code of the one kernel that `nvdisasm --print-code` prints."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label, code = _SASS_LABEL.match(line), _SASS_LINE.match(line)
        if label:
            labels[label[1]] = len(instructions)
        elif code:
            instructions.append(_sass(code[1]))
    return Listing(instructions=tuple(instructions), labels=labels)


def _sass(text: str) -> Instruction:
    words = text.lstrip("{ ").split()
    predicated = words[0].startswith("@")
    opcode, operands = (words[1], words[2:]) if predicated else (words[0], words[1:])
    base = opcode.split(".")[0]
    found = _SASS_BRANCH.search(text) if base in ("BRA", "JMP") else None
    table = _SASS_TABLE.search(text) if base in ("BRX", "BRXU") else None
    conditional = predicated or bool(found and len(operands) > 1)  # "BRA.U UP0, `(.L_x_0)"
    return Instruction(
        opcode=opcode,
        targets=(found[1],) if found else tuple(table[1].split(",")) if table else (),
        falls=conditional or base not in ("BRA", "JMP", "EXIT", "RET", "BRX", "BRXU"),
        text=text,
    )
