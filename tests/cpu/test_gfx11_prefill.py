"""gfx11_prefill: its machine code executed in the gfx11 emulator, and what its recorded hot loops are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16.codegen import golden
from w4a16.codegen.classes import matrix_share
from w4a16.codegen.compile import compile_launch
from w4a16.codegen.gfx11.faults import Fault
from w4a16.codegen.gfx11.launch import execute
from w4a16.codegen.isa import listing_of, read_isa
from w4a16.codegen.stems import compile_stem
from w4a16.codegen.verify import Check, compile_call, prepare, run
from w4a16.device import known_device
from w4a16.dispatch import choose, explanation
from w4a16.kernels.gfx11_prefill import plan
from w4a16.layouts import SKINNY, pack, pad_rows
from w4a16.problem import Problem
from w4a16.reference import reference_linear
from w4a16.tuning.gfx11_tiles import Gfx11Tile, paired_block_k
from w4a16.tuning.table import rows_of
from w4a16.tuning.tiles import why_illegal

GFX1151 = known_device("gfx1151")
GOLDEN = Path(__file__).parents[2] / "golden" / "isa" / "gfx1151"
SMALL = Gfx11Tile(block_m=32, block_n=64, block_k=32, warps_m=2, warps_n=2, feed="lds")
LARGE = Gfx11Tile(block_m=256, block_n=128, block_k=32, warps_m=4, warps_n=2, feed="lds")


def problem(**fields: object) -> Problem:
    return Problem(**({"m": 2048, "n": 4096, "k": 4096, "group": 128} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arch", "m", "n", "k", "group", "asym", "act", "tile"),
    [
        ("gfx1151", 17, 40, 128, 64, True, torch.bfloat16, SMALL),
        ("gfx1100", 33, 72, 96, 32, False, torch.float16, replace(SMALL, feed="registers")),
        ("gfx1151", 5, 16, 256, 128, True, torch.float16, replace(SMALL, block_m=16, block_n=16, warps_m=1, warps_n=1)),
        ("gfx1100", 37, 65, 128, 32, True, torch.bfloat16, replace(SMALL, dequant="group_sum", feed="registers")),
        ("gfx1151", 32, 128, 64, 64, True, torch.float16, replace(SMALL, block_k=64, warps_m=1, warps_n=4)),
        ("gfx1151", 37, 72, 96, 32, True, torch.bfloat16, replace(SMALL, feed="producers")),
        ("gfx1100", 69, 40, 256, 128, False, torch.float16, replace(SMALL, feed="producers", warps_m=1, warps_n=4)),
    ],
)
def test_strided_inputs_give_the_product(
    arch: str, m: int, n: int, k: int, group: int, asym: bool, act: torch.dtype, tile: Gfx11Tile
) -> None:
    weight = random_weight(n, k, group=group, asym=asym, act=act)
    x = torch.randn(m, k + 24).to(act)[:, :k]
    out = torch.empty(m, n + 3, dtype=act)[:, :n]
    bias = torch.randn(n).to(act) if asym else None
    for launch in plan(out=out, x=x, weight=pad_rows(pack(weight, layout=SKINNY)), bias=bias, tile=tile):
        assert [*launch.args, *launch.constants] == launch.fn.arg_names, "launched by position"
        execute(compile_launch(launch, known_device(arch)))
    assert_close(out, reference_linear(x, weight, bias))


@pytest.mark.parametrize("form", [{"rounding": "zero"}, {"dequant": "group_sum", "feed": "registers"}])
def test_variants_beside_those_of_verify(form: dict[str, str]) -> None:
    asked = problem(m=37, n=72, k=256, group=64, has_zeros=True)
    outcome = run(Check(stem="gfx11_prefill", tile=replace(SMALL, **form), problem=asked, bias=False), GFX1151)
    assert outcome.passed, outcome


@pytest.mark.parametrize(("feed", "loops"), [("lds", 1), ("registers", 1), ("producers", 2)])
def test_every_lost_barrier_faults(feed: str, loops: int) -> None:
    asked = problem(m=32, n=64, k=128, group=64)
    call = prepare(Check(stem="gfx11_prefill", tile=replace(SMALL, feed=feed), problem=asked, bias=False), GFX1151)
    (compiled,) = compile_call(call, GFX1151)
    lines = compiled.machine_code.splitlines()
    barriers = [number for number, line in enumerate(lines) if line.strip() == "s_barrier"]
    assert len(barriers) == 3 * loops  # before the loop, and one a step of the two in it
    for number in barriers:
        call.reset()
        with pytest.raises(Fault, match=r"no barrier between them|before it was written"):
            execute(compiled, "\n".join(lines[:number] + lines[number + 1 :]))


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_recorded_tiles_reach_their_share_of_the_matrix_units(version: str) -> None:
    lines = [line for line in golden.load(GOLDEN / f"{version}.csv") if line["symbol"] == "_gfx11_prefill"]
    assert len(lines) >= 7
    for line in lines:
        share = matrix_share(golden.opcode_counts(line["opcodes"]), "gfx1151")
        assert share is not None
        assert "v_readfirstlane_b32" not in line["opcodes"], "bases of buffers are scalar"
        assert share >= (0.80 if " fp16 " in line["problem"] else 0.72), line
        if "block_m=256" in line["tile"]:
            assert share >= (0.96 if " fp16 " in line["problem"] else 0.90), line


@pytest.mark.parametrize("act", ["bf16", "fp16"])
@pytest.mark.parametrize(("feed", "loops"), [("lds", 1), ("producers", 2)])
def test_without_zero_points_the_large_tile_is_as_good(act: str, feed: str, loops: int) -> None:
    compiled = compile_stem("gfx11_prefill", problem(act=act), GFX1151, replace(LARGE, feed=feed))[-1]
    reading = read_isa(compiled)
    assert reading.matrix_share is not None
    assert reading.matrix_share >= (0.96 if act == "fp16" else 0.90)
    assert reading.spills == 0
    assert reading.waves >= 2
    assert reading.opcodes["s_barrier"] == 4 * loops, "one a step"
    assert not any("wrexec" in i.text for i in listing_of(compiled).instructions), "a base that is not scalar: a loop"
    narrow = [name for name in reading.opcodes if name.startswith("ds_") and not name.endswith("b128")]
    assert not narrow, "LDS is read and written 16 bytes at a time"


@pytest.mark.parametrize(
    ("change", "fields", "sentence"),
    [
        ({"feed": "air"}, {}, "feed must be registers or lds or producers"),
        ({"feed": "producers", "dequant": "group_sum"}, {}, "consumers know no scales"),
        ({"feed": "producers", "warps_m": 16, "warps_n": 2}, {}, "warps must be at most"),
        ({"rounding": "up"}, {}, "rounding must be even or zero"),
        ({"dequant": "carrier"}, {}, "dequant must be magic or group_sum"),
        ({"rounding": "zero"}, {"act": "fp16"}, "rounding zero"),
        ({"rounding": "zero", "dequant": "group_sum"}, {}, "rounding zero"),
        ({"block_m": 16}, {}, "at least 16 x 16"),
        ({"block_m": 48}, {}, "power of two"),
        ({"block_k": 8}, {}, "at least 16 columns"),
        ({"block_m": 256, "block_n": 256}, {}, "accumulator registers"),
        ({"dequant": "group_sum"}, {}, "accumulator registers"),
        ({"block_k": 128, "warps_n": 4}, {}, "bytes of LDS"),
        ({}, {"group": 16}, "group must be 32, 64, 128"),
    ],
)
def test_each_limit_has_its_sentence(change: dict[str, object], fields: dict[str, object], sentence: str) -> None:
    assert why_illegal("gfx11_prefill", LARGE, problem(), GFX1151) is None
    found = why_illegal("gfx11_prefill", replace(LARGE, **change), problem(**fields), GFX1151)  # type: ignore[arg-type]
    assert found is not None
    assert sentence in found


def test_other_gpus_have_other_instructions() -> None:
    found = why_illegal("gfx11_prefill", LARGE, problem(), known_device("gfx1201"))
    assert found == "its instructions are those of gfx11; this is gfx1201"


@pytest.mark.parametrize(("k", "group", "step"), [(256, 128, 32), (96, 32, 16), (64, 32, 32), (32, 32, 16)])
def test_two_steps_divide_k(k: int, group: int, step: int) -> None:
    assert paired_block_k(32, k, group) == step


def test_the_larger_gpu_takes_tiles_that_are_recorded() -> None:
    """isa-golden compiles those of gfx1151."""
    smaller = [row.tile for row in rows_of("gfx1151")]
    assert all(row.tile in smaller for row in rows_of("gfx1100"))


@pytest.mark.parametrize(
    ("arch", "fields", "stem"),
    [
        ("gfx1151", {}, "gfx11_prefill"),
        ("gfx1100", {"m": 100, "act": "fp16", "has_zeros": True}, "gfx11_prefill"),
        ("gfx1151", {"m": 32}, "triton_prefill"),
        ("gfx1151", {"group": 16}, "triton_prefill"),
        ("gfx1151", {"m": 5}, "triton_decode"),
        ("gfx1103", {}, "triton_prefill"),
        ("gfx1201", {}, "triton_prefill"),
    ],
)
def test_dispatch(arch: str, fields: dict[str, object], stem: str) -> None:
    assert choose(problem(**fields), known_device(arch)).row.stem == stem


@pytest.mark.parametrize(
    ("arch", "fields", "sentence"),
    [
        ("gfx1151", {"group": 16}, "group must be 32, 64, 128, not 16"),
        ("gfx1103", {}, "no tuning row of gfx1103 says that it is faster here"),
    ],
)
def test_dispatch_says_why_not(arch: str, fields: dict[str, object], sentence: str) -> None:
    lines = explanation(problem(**fields), known_device(arch)).lines
    assert next(line.answer for line in lines if line.stem == "gfx11_prefill") == sentence
