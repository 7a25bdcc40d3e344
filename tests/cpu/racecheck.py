"""What compute-sanitizer's racecheck reports, less what it cannot follow, proven ordered from machine code.

Partitions: Triton's default warps tell the others which partition to run by a byte for each warp in shared memory. They
write it at the start and at the end; a warp reads its own in a loop. All warps pass every barrier number 1, so that
write, barrier, read, barrier, barrier, write, barrier, read are in that order. Where the default warps have passed a
barrier of their own before, racecheck reports the pairs all the same.

Words: a warpgroup writes a word, passes its own barrier, and one thread arrives at mbarrier A; another waits for A,
reads the word, passes its own barrier, and one thread arrives at mbarrier B, for which the first waits before it writes
again. racecheck reports both pairs.

Two controls in tests/device/sanitize_cases.py, of nothing but this, show such reports.
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
_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;|^(\.L_x_\d+):", re.MULTILINE)
_MEMORY = r"LD[^C]|ST|ATOM|RED\.|UTMA|UBLKCP|MEMBAR|FENCE"
_STOPS = re.compile(rf"label|BAR|BR|B?SYNC|CALL|RET|EXIT|{_MEMORY}")
_SHARED = re.compile(r"(LDS|STS)[ .]")
_OFFSET = re.compile(r"\+(-?)0x([0-9a-f]+)\]")
_WAIT = re.compile(r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT (P\d), ")
_BRANCH = re.compile(r"BRA `\((\.L_x_\d+)\)")
_WHOLE_BLOCK = "BAR.SYNC.DEFER_BLOCKING 0x1"  # no count of threads: all of the program's
_WARPGROUP = re.compile(r"BAR\.SYNC\.DEFER_BLOCKING 0x\w+, 0x80$")
_PASSED = re.compile(rf"{_WARPGROUP.pattern}|{_MEMORY}")  # between access and mbarrier, in a thread's own order
_DEFAULT_WARPS, _MOST_WARPS = 4, 16

Access = tuple[str, int]  # Read or Write, address


@dataclass(frozen=True, kw_only=True)
class Hazard:
    """One report: an access, and the others that were not ordered with it."""

    kernel: str
    accesses: frozenset[Access]
    text: str


@dataclass(frozen=True, kw_only=True)
class _Instruction:
    """Or a label, whose text is `label` and its name."""

    at: int
    guard: str
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


def _access(match: re.Match[str]) -> Access:
    return match[1], int(match[3], 16)


def handover(sass: str) -> frozenset[Access]:
    """The accesses to the bytes of partitions in one kernel's machine code, all beside a barrier of the whole program.

    Empty for a kernel without partitions. Raises ValueError where one is not beside such a barrier.
    """
    code = _read(sass)
    reads = [i for i, each in enumerate(code) if each.text.startswith("LDS.U8") and _beside_all(code[:i][::-1])]
    if not reads:
        return frozenset()
    (read,) = reads
    first = _offset(code[read].text)
    bytes_of_warps = range(first + _DEFAULT_WARPS, first + _MOST_WARPS)
    writes = [i for i, each in enumerate(code) if each.text.startswith("STS") and _offset(each.text) in bytes_of_warps]
    for i in writes:
        if not _beside_all([each for each in code[i + 1 :] if not each.text.startswith("STS")]):
            where = f"0x{code[i].at:x} {code[i].text}"
            raise ValueError(f"{where}: got no barrier of the whole program after it, wanted one")
    return frozenset({("Read", code[read].at), *(("Write", code[i].at) for i in writes)})


def words(sass: str) -> list[frozenset[Access]]:
    """The accesses that each pair of mbarriers orders, of one kernel's machine code.

    A write waits for one and arrives at the other, a read the other way round; each has a barrier of its warpgroup
    between access and arrival, and on the way nothing that jumps or waits but for that barrier.
    """
    code = _read(sass)
    found: dict[tuple[int, int], set[Access]] = {}  # by the mbarriers at which writes and reads arrive
    for i, each in enumerate(code):
        if not _SHARED.match(each.text) or each.guard:
            continue
        waited, arrived = _waited(code, i), _arrived(code, i)
        if waited is not None and arrived is not None:
            writes = each.text.startswith("STS")
            access = ("Write" if writes else "Read", each.at)
            found.setdefault((arrived, waited) if writes else (waited, arrived), set()).add(access)
    return [frozenset(each) for each in found.values() if {kind for kind, _ in each} == {"Read", "Write"}]


def _waited(code: list[_Instruction], i: int) -> int | None:
    """The mbarrier for which every way to instruction i waits last, by its address's offset; None: there is none."""
    jumps, labels = set(), []
    for each in reversed(code[:i]):
        if wait := _WAIT.match(each.text):
            leads = [k for k, other in enumerate(code) if (to := _BRANCH.match(other.text)) and to[1] in labels]
            at = _offset(each.text)
            # What jumps here is the loop that tries again, and its end is that it waited.
            return at if jumps == {f"!{wait[1]}"} and all(_waited(code, k) == at for k in leads) else None
        if each.text.startswith("label"):
            labels.append(each.text.split()[1])
        elif _BRANCH.match(each.text):
            jumps.add(each.guard)
        elif _STOPS.match(each.text) and not _PASSED.match(each.text):
            return None
    return None


def _arrived(code: list[_Instruction], i: int) -> int | None:
    """The mbarrier at which a thread arrives after instruction i and a barrier of its warpgroup, likewise."""
    passed = False
    for k, each in enumerate(code[i + 1 :], i + 1):
        if _WARPGROUP.match(each.text) and not each.guard:
            passed = True
        elif _STOPS.match(each.text) and not _PASSED.match(each.text) and not _skips_arrival(code, k):
            return _offset(each.text) if passed and each.text.startswith("SYNCS.ARRIVE") else None
    return None


def _skips_arrival(code: list[_Instruction], k: int) -> bool:
    """Whether instruction k is where all threads but one jump over an arrival, which has no predicate then."""
    jump = _BRANCH.match(code[k].text)
    if not jump or not code[k].guard:
        return False
    leads = _BRANCH.match(code[k + 2].text)
    there = code[k + 2].text == f"label {jump[1]}" or (leads and leads[1] == jump[1] and not code[k + 2].guard)
    return code[k + 1].text.startswith("SYNCS.ARRIVE") and bool(there)


def _read(sass: str) -> list[_Instruction]:
    return [
        _Instruction(at=int(at, 16) if at else -1, guard=guard, text=text or f"label {label}")
        for at, guard, text, label in _LINE.findall(sass)
    ]


def _beside_all(code: Iterable[_Instruction]) -> bool:
    """Whether a barrier of the whole program comes before any other that orders, jumps or touches memory."""
    stop = next((each.text for each in code if _STOPS.match(each.text)), "")
    return stop == _WHOLE_BLOCK


def _offset(text: str) -> int:
    found = _OFFSET.search(text)
    return int(found[1] + found[2], 16) if found else 0


def unexplained(reports: Iterable[Hazard], codes: dict[str, list[str]]) -> list[Hazard]:
    """The reports that no single machine code of their kernel explains, by partitions or a word. codes: by kernel."""
    own = {name: [known for sass in every for known in (handover(sass), *words(sass))] for name, every in codes.items()}
    return [report for report in reports if not any(report.accesses <= known for known in own.get(report.kernel, []))]


def disassembled(cubin: Path) -> str:
    """SASS, by the tool that Triton's wheel carries."""
    from triton import knobs

    command = [knobs.nvidia.nvdisasm.path, "--print-code", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
