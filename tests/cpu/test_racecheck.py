"""racecheck's reports, judged by machine code: what is Triton's hand-over of partitions, and what is not."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import racecheck_controls
import torch
from racecheck import Hazard, handover, hazards, unexplained, words

from w4a16.codegen.compile import compile_launch
from w4a16.device import known_device
from w4a16.kernels._launch import Launch

OUTPUT = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at kernel+0x240 in kernel.py:307
=========     and Write access at kernel+0x7810 in kernel.py:307 [14 hazards]
=========     and Write access at kernel+0x9cd0 in kernel.py:365 [12 hazards]
=========
========= Warning: Race reported between Write access at other+0x10 in kernel.py:1
=========     and Write access at other+0x20 in kernel.py:2 [1 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)
"""


def compiled(fn: Any, lanes: int, **args: int) -> str:
    out = torch.empty(lanes, dtype=torch.int32, device="meta")
    launch = Launch(fn=fn, grid=(1,), args={"out_ptr": out, **args}, constants={}, options={"num_warps": 4})
    return compile_launch(launch, known_device("sm90")).machine_code


@pytest.fixture(scope="module")
def sass() -> str:
    return compiled(racecheck_controls.partitions, 384)


@pytest.fixture(scope="module")
def told() -> str:
    return compiled(racecheck_controls.words, 256, turns=5)


def test_reports_are_read_whole() -> None:
    first, second = hazards(OUTPUT)
    assert first.accesses == {("Read", 0x240), ("Write", 0x7810), ("Write", 0x9CD0)}
    assert (second.kernel, second.accesses) == ("other", {("Write", 0x10), ("Write", 0x20)})
    with pytest.raises(ValueError, match="wanted the"):
        hazards(OUTPUT.replace("2 hazards displayed", "3 hazards displayed"))
    with pytest.raises(ValueError, match="got 0 reports"):
        hazards("it crashed")


def test_only_the_handover_is_explained(sass: str) -> None:
    own = handover(sass)
    assert sorted(kind for kind, _ in own)[:2] == ["Read", "Write"]
    report = Hazard(kernel="partitions", accesses=own, text="")
    assert not unexplained([report], {"partitions": [sass]})
    assert unexplained([report], {"another": [sass]})
    assert unexplained([replace(report, accesses=own | {("Write", 0x20)})], {"partitions": [sass]})
    assert unexplained([replace(report, accesses=frozenset({("Read", 0x20)}))], {"partitions": [sass]})


def test_a_handover_without_its_barriers_is_not_accepted(sass: str) -> None:
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x1"
    assert not handover(sass.replace(barrier, f"{barrier}, 0x80"))
    lines = sass.splitlines()
    last_write = max(i for i, line in enumerate(lines) if " STS" in line)
    after = next(i for i in range(last_write, len(lines)) if barrier in lines[i])
    lines[after] = lines[after].replace(barrier, "NOP")
    with pytest.raises(ValueError, match="no barrier"):
        handover("\n".join(lines))


def test_words_between_mbarriers_are_explained(told: str) -> None:
    (known,) = words(told)
    assert sorted(kind for kind, _ in known) == ["Read", "Read", "Write", "Write"]  # two consumers; the last word
    report = Hazard(kernel="words", accesses=known, text="")
    assert not unexplained([report], {"words": [told]})
    assert unexplained([replace(report, accesses=known | handover(told))], {"words": [told]})


@pytest.mark.parametrize("end", ["\n{name}:", "/*9985*/ BRA `({name}) ;\n/*9986*/ NOP ;\n{name}:"])
def test_an_arrival_may_be_jumped_over_and_more_be_shared(told: str, end: str) -> None:
    """As ptxas writes the hand-over of sums: many accesses, and a branch in place of the arrival's predicate."""
    label = itertools.count(900)

    def jumped(match: re.Match[str]) -> str:
        name = f".L_x_{next(label)}"
        return f"@{match[1]} BRA `({name}) ; /*9980*/ {match[2]} {end.format(name=name)}\n"

    over, count = re.subn(r"@!(P\d) (SYNCS\.ARRIVE[^;]*;)", jumped, told)
    assert count
    (known,) = words(told)
    assert any(known <= found for found in words(over))
    for also in ("LDS.128 R4, [R8+0x10]", "UTMASTG.2D [UR4], [UR6]", "FENCE.VIEW.ASYNC.S"):
        more, count = re.subn(r"((LDS|STS) [^;]*;)", rf"\1 /*9970*/ {also} ;", over)
        assert count
        assert any(known <= found for found in words(more))
    beyond = re.sub(r"(@P\d BRA `\(\.L_x_9\d\d\) ;)", r"\1 /*9960*/ NOP ;", over)  # the branch jumps over another
    assert not words(beyond)


@pytest.mark.parametrize(
    ("ordered", "broken"),
    [
        (r"SYNCS\.PHASECHK", "NOP"),  # no wait
        (r"SYNCS\.ARRIVE", "NOP"),  # no arrival
        (r"BAR\.SYNC\.DEFER_BLOCKING 0x\w, 0x80", "NOP"),  # no barrier of the warpgroup
        (r"@!(P\d) BRA `\((\.L_x_\d+)\) ;(?=[^;]*\n\.L)", r"@\1 BRA `(\2) ;"),  # goes on where it has not waited
        (r"(LDS R\d+|STS) ", r"BAR.ARV 0x9, 0x80 ; /*9990*/ \1 "),  # another barrier on the way
    ],
)
def test_words_without_that_order_are_not(told: str, ordered: str, broken: str) -> None:
    assert re.search(ordered, told)
    assert not words(re.sub(ordered, broken, told))
