"""sm90_moe_few without a Hopper GPU: every kind of launch compiles for it and spills nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_sm90_moe_decode import BF16, EXPERTS, FP16, HIDDEN, INTER, meta, packed

from w4a16 import Problem
from w4a16.codegen.compile import compile_launch
from w4a16.codegen.stems import launches as planned
from w4a16.compat import told_registers
from w4a16.device import known_device
from w4a16.dispatch import choose
from w4a16.kernels import sm90_moe_few
from w4a16.kernels._launch import Launch
from w4a16.kernels.sm90_moe_few import few
from w4a16.tuning.tiles import why_illegal

H100 = known_device("sm90")


def launches(
    tokens: int = 1,
    top_k: int = 8,
    group: int = 128,
    act: torch.dtype = BF16,
    asym: bool = False,
    parts: int = 4,
    activation: str = "silu",
) -> tuple[Launch, ...]:
    x = meta(tokens, HIDDEN, dtype=act)
    return few(
        out=torch.empty_like(x),
        x=x,
        w13=packed(2 * INTER, HIDDEN, group, act, asym),
        w2=packed(HIDDEN, INTER, group, act, asym),
        topk_weights=meta(tokens, top_k, dtype=torch.float32),
        topk_ids=meta(tokens, top_k, dtype=torch.int64),
        activation=activation,
        gated=True,
        weight_input=False,
        parts=parts,
    )


@pytest.mark.parametrize(
    ("group", "act", "asym", "parts"),
    [(128, BF16, False, 4), (128, FP16, True, 8), (64, BF16, True, 4), (32, FP16, True, 4)],
)
def test_nothing_spills(group: int, act: torch.dtype, asym: bool, parts: int) -> None:
    for launch in launches(group=group, act=act, asym=asym, parts=parts):
        compiled = compile_launch(launch, H100)
        assert compiled.spills == 0, (compiled.name, compiled.registers)


def test_programs_of_16_rows() -> None:
    gemm1, gemm2 = launches(tokens=2)
    assert (gemm1.cluster, gemm1.grid) == (1, (INTER // 16, 2 * 8))
    assert (gemm2.cluster, gemm2.grid) == (1, (HIDDEN // 16, 2))
    assert gemm2.args["x_ptr"].shape == (16, INTER)
    assert len(launches(tokens=2, top_k=10)) == 3


@pytest.mark.parametrize("asym", [False, True])
def test_codes_are_asked_for_before_any_wait(asym: bool) -> None:
    """gemm1 asks for them before it waits for x, gemm2 before it waits for gemm1."""
    for launch, wait in zip(launches(parts=8, asym=asym), ("DEPBAR.LE", "ACQBULK"), strict=True):
        before, _, after = compile_launch(launch, H100).machine_code.partition(wait)
        tiles = launch.constants["TILES"] * (2 if launch.constants["GATED"] else 1)
        assert (before.count("LDG.E.EF.128"), after.count("LDG.E.EF.128")) == (tiles, 0)


def asked(m: int = 1, n: int = 2 * INTER, k: int = HIDDEN, **fields: Any) -> Problem:
    return Problem(m=m, n=n, k=k, group=128, **{"experts": EXPERTS, "top_k": 8, **fields})


def test_a_few_tokens_of_a_layer_that_fits_take_it() -> None:
    assert [choose(asked(m), H100).tile.parts for m in (1, 5, 16)] == [8, 8, 0]
    for other in (asked(k=4096), asked(n=4096), asked(m=5, experts=16)):
        assert choose(other, H100).tile.parts == 0
    names = [launch.fn.__name__ for launch in planned("sm90_moe", asked(5), H100)]
    assert names == ["_sm90_moe_few"] * 2


@pytest.mark.parametrize(
    ("fields", "registers"),
    [
        ({"has_zeros": True}, 136),
        ({"has_zeros": True, "act": "fp16"}, 136),
        ({"has_zeros": True, "n": 1024}, 0),
        ({}, 0),
        ({"m": 5, "has_zeros": True}, 0),
        ({"has_zeros": True, "top_k": 10, "experts": 512}, 0),
    ],
)
def test_gemm2_of_one_token_is_told_its_registers(
    fields: dict[str, Any], registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the row's number, which no option carries on Triton 3.7 and later."""
    here = [launch.options.get("maxnreg") for launch in planned("sm90_moe", asked(**fields), H100)]
    assert here[:2] == [None, told_registers(registers).get("maxnreg")]
    monkeypatch.setattr(sm90_moe_few, "told_registers", lambda count: {"told": count})
    told = [launch.options.get("told") for launch in planned("sm90_moe", asked(**fields), H100)]
    assert told[:2] == [0, registers]


def test_limits_say_what_they_want() -> None:
    tile = choose(asked(), H100).tile
    assert "parts must be 4 or 8" in (why_illegal("sm90_moe", replace(tile, parts=2), asked(), H100) or "")
    assert "parts must be 4 or 8" in (why_illegal("sm90_moe", replace(tile, block_m=8), asked(), H100) or "")
    alone = replace(tile, parts=0, registers=112)
    assert "registers go with parts: registers=112, parts=0" in (why_illegal("sm90_moe", alone, asked(), H100) or "")
    assert "words of 32 tiles at its start" in (
        why_illegal("sm90_moe", replace(tile, parts=4), asked(k=4096), H100) or ""
    )
