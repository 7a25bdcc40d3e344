"""racecheck's reports, judged by machine code: what is Triton's hand-over of partitions, and what is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from racecheck import Hazard, handover, hazards, unexplained
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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


@gluon.jit
def _lanes(out_ptr, first):
    lane = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out_ptr + first + lane, first + lane)


@gluon.jit
def _partitions(out_ptr):
    gl.warp_specialize([(_lanes, (out_ptr, 0)), (_lanes, (out_ptr, 128)), (_lanes, (out_ptr, 256))], [4, 4], [24, 24])


@pytest.fixture(scope="module")
def sass() -> str:
    out = torch.empty(384, dtype=torch.int32, device="meta")
    launch = Launch(fn=_partitions, grid=(1,), args={"out_ptr": out}, constants={}, options={"num_warps": 4})
    return compile_launch(launch, known_device("sm90")).machine_code


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
    report = Hazard(kernel="_partitions", accesses=own, text="")
    assert not unexplained([report], {"_partitions": [sass]})
    assert unexplained([report], {"another": [sass]})
    assert unexplained([replace(report, accesses=own | {("Write", 0x20)})], {"_partitions": [sass]})
    assert unexplained([replace(report, accesses=frozenset({("Read", 0x20)}))], {"_partitions": [sass]})


def test_a_handover_without_its_barriers_is_not_accepted(sass: str) -> None:
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x1"
    assert not handover(sass.replace(barrier, f"{barrier}, 0x80"))
    lines = sass.splitlines()
    last_write = max(i for i, line in enumerate(lines) if " STS" in line)
    after = next(i for i in range(last_write, len(lines)) if barrier in lines[i])
    lines[after] = lines[after].replace(barrier, "NOP")
    with pytest.raises(ValueError, match="no barrier"):
        handover("\n".join(lines))
