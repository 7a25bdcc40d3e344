"""The model of RDNA3's time: its parts, and its predictions against what the sources measured on gfx1151."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from w4a16.codegen.gfx11.lds import Meter
from w4a16.codegen.listing import parse_amdgcn
from w4a16.codegen.model import GLOBAL_LATENCY, SHARED_LATENCY, block_of, exposed_waits, predict, read_trip
from w4a16.codegen.stems import compile_stem
from w4a16.device import known_device
from w4a16.problem import Problem

GFX1151 = known_device("gfx1151")
LANES = np.arange(32)


@pytest.fixture(scope="module")
def sources() -> ModuleType:
    """benchmarks/gfx11_model.py, which holds the sources' kernel and their measurements."""
    path = Path(__file__).parents[2] / "benchmarks" / "gfx11_model.py"
    spec = importlib.util.spec_from_file_location("gfx11_model", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gfx11_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("address", "size", "cycles"),
    [
        (LANES * 4, 4, 1),
        (LANES * 2, 2, 1),
        (LANES * 0, 4, 1),  # one word for all
        (LANES * 8, 4, 2),  # every other bank
        (LANES * 128, 4, 32),  # one bank
        (LANES * 16, 16, 4),  # eight lanes at once
        (LANES * 64, 16, 16),  # rows of 64 bytes without a swizzle: four rows to a bank
        (LANES * 8, 8, 2),
    ],
)
def test_banks(address: Any, size: int, cycles: int) -> None:
    meter = Meter()
    gang: Any = SimpleNamespace(active=np.ones((1, 32), bool), pc=7, count=1)
    meter.count(gang, address[None, :], size)
    assert (meter.cycles[7], meter.waves[7]) == (cycles, 1)


def waits(*lines: str) -> int:
    return exposed_waits(parse_amdgcn("\n".join(("kernel:", *lines))).instructions, "gfx1151")


def test_waits_are_what_work_does_not_cover() -> None:
    load, wait = "buffer_load_b128 v[0:3], v9, s[0:3], 0 offen", "s_waitcnt vmcnt(0)"
    wmma = "v_wmma_f32_16x16x16_f16 v[10:17], v[20:27], v[30:37], v[10:17]"
    assert waits(load, wait) == GLOBAL_LATENCY
    assert waits(load, wmma, wmma, wait) == GLOBAL_LATENCY - 64
    assert waits(load, *[wmma] * 20, wait) == 0
    assert waits(load, load, "s_waitcnt vmcnt(1)", wmma, wait) == GLOBAL_LATENCY, "both arrive at once"
    assert waits("ds_load_b128 v[0:3], v9", "s_waitcnt lgkmcnt(0)", wmma) == SHARED_LATENCY


@pytest.mark.parametrize(("blocks_m", "blocks_n", "raster"), [(5, 3, 4), (8, 2, 4), (3, 7, 0), (1, 4, 8)])
def test_every_block_has_one_program(blocks_m: int, blocks_n: int, raster: int) -> None:
    found = [block_of(program, blocks_m, blocks_n, raster) for program in range(blocks_m * blocks_n)]
    assert sorted(found) == list(itertools.product(range(blocks_m), range(blocks_n)))


def test_the_sources_ratios(sources: ModuleType) -> None:
    """Both changes that were faster are predicted to be, by within 15 % of what they gained."""
    for case in (*sources.subtractions(), *sources.tiles()):
        assert case.predicted_ratio < 1, case
        assert case.predicted_ratio == pytest.approx(case.ratio, rel=0.15), case
    for case in sources.unrolled():  # where it fails: 1 to 4 % were measured, the issue port sees nothing of it
        assert case.predicted_ratio == pytest.approx(1, abs=0.02), case


def test_the_sources_times(sources: ModuleType) -> None:
    """bf16 is left out: the sources' Triton multiplied it in fewer instructions than 3.7 and later."""
    for case in sources.tiles():
        for told, measured in zip(case.predicted(), case.milliseconds, strict=True):
            assert 1e3 * told.seconds == pytest.approx(measured, rel=0.15), case


@pytest.mark.parametrize("zeros", [False, True])
def test_the_large_gemm(zeros: bool) -> None:
    """Where CK took 30.0 TFLOP/s without and 26.4 with zero points, and the BLAS 38.6 in fp16."""
    problem = Problem(m=3968, n=19456, k=2560, group=128, act="fp16", has_zeros=zeros)
    (compiled,) = compile_stem("gfx11_prefill", problem, GFX1151)
    told = predict(problem, GFX1151, compiled, read_trip(compiled))
    assert told.bound == "issue"
    assert 33 <= told.tflops <= 38.6
