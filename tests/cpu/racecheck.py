"""What compute-sanitizer's racecheck reports, less the hand-over of Triton's warp_specialize, proven from machine code.

Triton's default warps tell the others which partition to run by a byte for each warp in shared memory. They write it at
the start and at the end; a warp reads its own in a loop. All warps pass every barrier number 1, so that write, barrier,
read, barrier, barrier, write, barrier, read are in that order. Where the default warps have passed a barrier of their
own before, racecheck reports the pairs all the same, in a kernel that has no other shared memory too: the control in
tests/device/sanitize_cases.py.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ACCESS = r"(Read|Write) access at (\w+)\+0x([0-9a-f]+) in "
_HEAD = re.compile(rf"^========= (?:Error|Warning): Race reported between {_ACCESS}")
_OTHER = re.compile(rf"^=========     and {_ACCESS}")
_SUMMARY = re.compile(r"^========= RACECHECK SUMMARY: (\d+) hazards? displayed")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d\s+)?(.*?)\s*;|^\.L_x_\d+:", re.MULTILINE)
_STOPS = re.compile(r"label|BAR|BR|B?SYNC|CALL|RET|EXIT|LD[^C]|ST|ATOM|RED\.|UTMA|UBLKCP|MEMBAR|FENCE")
_OFFSET = re.compile(r"\+(-?)0x([0-9a-f]+)\]")
_WHOLE_BLOCK = "BAR.SYNC.DEFER_BLOCKING 0x1"  # no count of threads: all of the program's
_DEFAULT_WARPS, _MOST_WARPS = 4, 16


@dataclass(frozen=True, kw_only=True)
class Hazard:
    """One report: an access, and the others that were not ordered with it. An access is (Read or Write, address)."""

    kernel: str
    accesses: frozenset[tuple[str, int]]
    text: str


def hazards(output: str) -> list[Hazard]:
    """Every report in what racecheck printed. Raises ValueError where they are not as many as it says."""
    found: list[Hazard] = []
    for line in output.splitlines():
        if head := _HEAD.match(line):
            found.append(Hazard(kernel=head[2], accesses=frozenset({_access(head)}), text=line))
        elif other := _OTHER.match(line):
            last = found.pop()
            found.append(
                Hazard(
                    kernel=last.kernel if other[2] == last.kernel else "",
                    accesses=last.accesses | {_access(other)},
                    text=f"{last.text}\n{line}",
                )
            )
    said = [int(line[1]) for line in map(_SUMMARY.match, output.splitlines()) if line]
    if sum(said) != len(found) or not said:
        raise ValueError(f"racecheck: got {len(found)} reports, wanted the {said} of its summary. Read its output.")
    return found


def _access(match: re.Match[str]) -> tuple[str, int]:
    return match[1], int(match[3], 16)


def handover(sass: str) -> frozenset[tuple[str, int]]:
    """The accesses to the bytes of partitions in one kernel's machine code, all beside a barrier of the whole program.

    Empty for a kernel without partitions. Raises ValueError where one is not beside such a barrier.
    """
    code = [(int(at, 16) if at else -1, text or "label") for at, text in _INSTRUCTION.findall(sass)]
    reads = [i for i, (_, text) in enumerate(code) if text.startswith("LDS.U8") and _nearest(code[:i][::-1])]
    if not reads:
        return frozenset()
    (read,) = reads
    first = _offset(code[read][1])
    bytes_of_warps = range(first + _DEFAULT_WARPS, first + _MOST_WARPS)
    writes = [i for i, (_, text) in enumerate(code) if text.startswith("STS") and _offset(text) in bytes_of_warps]
    for i in writes:
        if not _nearest([each for each in code[i + 1 :] if not each[1].startswith("STS")]):
            raise ValueError(f"0x{code[i][0]:x} {code[i][1]}: got no barrier of the whole program after it, wanted one")
    return frozenset({("Read", code[read][0]), *(("Write", code[i][0]) for i in writes)})


def _nearest(code: Iterable[tuple[int, str]]) -> bool:
    """Whether a barrier of the whole program comes before any other that orders, jumps or touches memory."""
    stop = next((text for _, text in code if _STOPS.match(text)), "")
    return stop == _WHOLE_BLOCK


def _offset(text: str) -> int:
    found = _OFFSET.search(text)
    return int(found[1] + found[2], 16) if found else 0


def unexplained(reports: Iterable[Hazard], codes: dict[str, list[str]]) -> list[Hazard]:
    """The reports that no single one of a kernel's machine codes explains by its hand-over. codes: by kernel name."""
    own = {name: [handover(sass) for sass in every] for name, every in codes.items()}
    return [report for report in reports if not any(report.accesses <= known for known in own.get(report.kernel, []))]


def disassembled(cubin: Path) -> str:
    """SASS, by the tool that Triton's wheel carries."""
    from triton import knobs

    command = [knobs.nvidia.nvdisasm.path, "--print-code", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
