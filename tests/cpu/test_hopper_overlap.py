"""benchmarks/hopper_overlap.py measures the instructions that it names, beside wgmma that ptxas leaves asynchronous."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import benchmark

from w4a16.codegen.compile import compile_launch
from w4a16.device import known_device
from w4a16.kernels._launch import Launch


@pytest.fixture(scope="module")
def overlap() -> Any:
    return benchmark("hopper_overlap")


@pytest.mark.parametrize(
    ("kind", "opcode"),
    [("lop3, immediates", "LOP3"), ("shift", "SHF"), ("add.bf16x2", "HADD2"), ("mul.f32", "FMUL"), ("mad.s32", "IMAD")],
)
def test_the_instruction_is_the_one_named(overlap: Any, kind: str, opcode: str) -> None:
    launch = Launch(
        fn=overlap._both,
        grid=(132,),
        args={"out_ptr": torch.empty(overlap.OUT, dtype=torch.int32, device="meta"), "products": 100, "turns": 100},
        constants={"TEXT": overlap.text_of(kind), "COLUMNS": 64, "OF_REGISTERS": True},
        options={"num_warps": 4},
    )
    compiled = compile_launch(launch, known_device("sm90"))
    opcodes = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", compiled.machine_code))
    assert opcodes[opcode] >= 2 * overlap.REPEATED * overlap.REGISTERS.value  # two warpgroups issue them
    assert opcodes["HGMMA"] >= 2 * 4
    assert not compiled.serialised_wgmma
    assert compiled.spills == 0
