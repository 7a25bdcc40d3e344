"""gfx11_moe: its machine code executed in the gfx11 emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16.codegen.compile import compile_launch
from w4a16.codegen.gfx11.faults import Fault
from w4a16.codegen.gfx11.launch import execute
from w4a16.codegen.isa import read_isa
from w4a16.codegen.stems import compile_stem
from w4a16.codegen.verify import Check, compile_call, prepare
from w4a16.device import known_device
from w4a16.dispatch import choose, explanation
from w4a16.errors import Unsupported
from w4a16.kernels.gfx11_moe import plan
from w4a16.layouts import SKINNY, pack, pad_rows
from w4a16.problem import Problem
from w4a16.reference import reference_moe
from w4a16.tuning.gfx11_tiles import Gfx11Tile
from w4a16.tuning.tiles import why_illegal

GFX1151 = known_device("gfx1151")
SMALL = Gfx11Tile(block_m=32, block_n=64, block_k=32, warps_m=1, warps_n=2, feed="lds")
ON_SUM = replace(SMALL, dequant="group_sum")


def problem(**fields: object) -> Problem:
    sizes = {"m": 2048, "n": 1024, "k": 2048, "group": 128, "experts": 256, "top_k": 8}
    return Problem(**(sizes | fields))  # type: ignore[arg-type]


def layer(tokens: int, act: torch.dtype, **options: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments of `plan` for four experts of 64 hidden and 96 intermediate values, and what they give."""
    group, asym, gated = options.get("group", 32), options.get("asym", True), options.get("gated", True)
    order, top_k = options.get("act_order", False), options.get("top_k", 2)
    shape = {"group": group, "asym": asym, "act": act, "experts": 4, "act_order": order}
    w13 = random_weight(192 if gated else 96, 64, **shape)
    w2 = random_weight(64, 96, **shape)
    ids = torch.rand(tokens, 4).topk(top_k).indices
    ids[-1, -1] = options.get("last", ids[-1, -1])
    given: dict[str, Any] = {
        "topk_weights": torch.rand(tokens, top_k),
        "topk_ids": ids,
        "activation": options.get("activation", "silu"),
        "gated": gated,
        "weight_input": options.get("weight_input", False),
    }
    x = torch.randn(tokens, 64 + 8).to(act)[:, :64]
    wanted = reference_moe(x, w13, w2, **given)
    packed = {"w13": pad_rows(pack(w13, layout=SKINNY)), "w2": pad_rows(pack(w2, layout=SKINNY))}
    return {"x": x, "out": torch.empty(tokens, 64, dtype=act), **packed, **given}, wanted


@pytest.mark.parametrize(
    ("arch", "tokens", "act", "tile", "options"),
    [
        ("gfx1151", 40, torch.bfloat16, ON_SUM, {}),  # blocks of 32 rows
        ("gfx1100", 17, torch.float16, SMALL, {"asym": False, "last": -1}),  # of 16
        ("gfx1151", 9, torch.bfloat16, replace(ON_SUM, feed="registers"), {"act_order": True}),
        ("gfx1100", 40, torch.float16, SMALL, {"top_k": 1, "weight_input": True, "act_order": True, "asym": False}),
        ("gfx1151", 9, torch.float16, SMALL, {"gated": False, "activation": "relu"}),
        ("gfx1100", 9, torch.float16, ON_SUM, {"activation": "gelu", "asym": False}),
        ("gfx1151", 9, torch.float16, SMALL, {"activation": "gelu_tanh"}),
        ("gfx1151", 1, torch.bfloat16, ON_SUM, {}),
    ],
)
def test_a_layer_gives_what_it_should(
    arch: str, tokens: int, act: torch.dtype, tile: Gfx11Tile, options: dict[str, Any]
) -> None:
    arguments, wanted = layer(tokens, act, **options)
    for launch in plan(**arguments, tile=tile):
        assert [*launch.args, *launch.constants] == launch.fn.arg_names, "launched by position"
        execute(compile_launch(launch, known_device(arch)))
    assert_close(arguments["out"], wanted)


def test_every_lost_barrier_faults() -> None:
    asked = problem(m=5, n=256, k=128, group=32, experts=4, top_k=2)  # two trips of both GEMMs
    call = prepare(Check(stem="gfx11_moe", tile=ON_SUM, problem=asked, bias=False), GFX1151)
    codes = compile_call(call, GFX1151)
    for which, compiled in enumerate(codes):
        if compiled.name != "_gfx11_moe":
            continue
        lines = compiled.machine_code.splitlines()
        barriers = [number for number, line in enumerate(lines) if line.strip() == "s_barrier"]
        assert len(barriers) == 3
        for number in barriers:
            call.reset()
            for before in codes[:which]:
                execute(before)
            with pytest.raises(Fault, match=r"no barrier between them|before it was written"):
                execute(compiled, "\n".join(lines[:number] + lines[number + 1 :]))


@pytest.mark.parametrize(("act", "share"), [("fp16", 0.80), ("bf16", 0.84)])
def test_the_production_tile(act: str, share: float) -> None:
    gemms = [c for c in compile_stem("gfx11_moe", problem(act=act, has_zeros=True), GFX1151) if c.name == "_gfx11_moe"]
    for reading in map(read_isa, gemms):
        assert reading.matrix_share is not None
        assert reading.matrix_share >= share
        assert reading.spills == 0
        assert reading.waves >= 2
    assert len(gemms) == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"m": 16}, "m must be at least 17"),
        ({"group": 16}, "group must be 32, 64, 128, not 16"),
        ({"m": 1 << 18}, "must have at most 1073741824 values"),
    ],
)
def test_dispatch_says_why_not(fields: dict[str, object], sentence: str) -> None:
    assert choose(problem(), GFX1151).row.stem == "gfx11_moe"
    asked = problem(**fields)
    assert choose(asked, GFX1151).row.stem == "triton_moe"
    answer = next(line.answer for line in explanation(asked, GFX1151).lines if line.stem == "gfx11_moe")
    assert sentence in answer


@pytest.mark.parametrize(
    ("change", "fields", "sentence"),
    [
        ({"warps_m": 2}, {}, "warps_m must be 1"),
        ({"block_n": 32}, {}, "gate and up"),
        ({"dequant": "magic"}, {}, "take group_sum"),
    ],
)
def test_each_limit_has_its_sentence(change: dict[str, object], fields: dict[str, object], sentence: str) -> None:
    assert why_illegal("gfx11_moe", ON_SUM, problem(), GFX1151) is None
    found = why_illegal("gfx11_moe", replace(ON_SUM, **change), problem(**fields), GFX1151)  # type: ignore[arg-type]
    assert found is not None
    assert sentence in found


def test_a_second_weight_with_another_group_is_refused() -> None:
    arguments, _ = layer(5, torch.float16)
    arguments["w2"] = replace(arguments["w2"], group=96)
    with pytest.raises(Unsupported, match="the group of w2 is 96, must be 32, 64, 128"):
        plan(**arguments, tile=SMALL)
