"""The model of RDNA3's time: its parts, and its predictions against what the sources measured on gfx1151."""

from __future__ import annotations

import itertools
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import benchmark

from w4a16.codegen.gfx11.lds import Meter
from w4a16.codegen.isa import hot_paths
from w4a16.codegen.listing import parse_amdgcn
from w4a16.codegen.model import block_of, predict, read_trip
from w4a16.codegen.schedule import GLOBAL_LATENCY, SHARED_LATENCY, Walk, port_use, step_of
from w4a16.codegen.stems import compile_stem
from w4a16.device import known_device
from w4a16.problem import Problem

GFX1151 = known_device("gfx1151")
LANES = np.arange(32)


@pytest.fixture(scope="module")
def sources() -> ModuleType:
    """benchmarks/gfx11_model.py, which holds what the sources measured."""
    return benchmark("gfx11_model")


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


LOAD, READ, BARRIER = "buffer_load_b32 v1, v2, s[0:3], 0 offen", "ds_load_b128 v[0:3], v9", "s_barrier"
WMMA = "v_wmma_f32_16x16x16_f16 v[10:17], v[20:27], v[30:37], v[10:17]"


def walk(*lines: str) -> Walk:
    listing = parse_amdgcn("\n".join(("kernel:", *lines)))
    return tuple(step_of(i, "gfx1151", 8.0 if i.opcode.startswith("ds_") else 0.0) for i in listing.instructions)


def test_a_wave_alone_waits_for_what_it_asks() -> None:
    alone = port_use((walk(LOAD, "s_waitcnt vmcnt(0)", *[WMMA] * 20),), 1, 1)
    assert alone == pytest.approx(640 / (GLOBAL_LATENCY + 640), abs=0.01)
    assert port_use((walk(LOAD, *[WMMA] * 20, "s_waitcnt vmcnt(0)"),), 1, 1) == pytest.approx(1, abs=0.01)
    reads = port_use((walk(READ, "s_waitcnt lgkmcnt(0)", *[WMMA] * 4),), 1, 1)
    assert reads == pytest.approx(128 / (8 + SHARED_LATENCY + 128), abs=0.02)
    two = walk(LOAD, LOAD, "s_waitcnt vmcnt(1)", *[WMMA] * 20, "s_waitcnt vmcnt(0)")
    assert port_use((two,), 1, 1) == pytest.approx(640 / (GLOBAL_LATENCY + 640), abs=0.01), "both arrive at once"


def test_other_programs_fill_the_gap_and_waves_of_the_same_do_not() -> None:
    waits = walk(LOAD, "s_waitcnt vmcnt(0)", BARRIER, *[WMMA] * 20)
    assert port_use((waits,), 1, 1) < 0.6 < port_use((waits,), 1, 2)
    assert port_use((waits,), 1, 4) == pytest.approx(1, abs=0.01)
    assert port_use((waits,), 2, 1) == pytest.approx(1280 / (GLOBAL_LATENCY + 1280), abs=0.02)


def test_a_producer_waits_beside_its_consumer() -> None:
    consumer = walk(BARRIER, *[WMMA] * 20)
    producer = walk(LOAD, *["v_add_nc_u32 v0, v1, v2"] * 20, "s_waitcnt vmcnt(0)", BARRIER)
    assert port_use((consumer, producer), 1, 1) == pytest.approx(1, abs=0.02)


def test_lds_serves_one_wave_after_the_other() -> None:
    reads = walk(*[READ] * 40, "s_waitcnt lgkmcnt(0)", WMMA)  # 320 cycles of LDS, 32 of the port
    assert port_use((reads,), 1, 8) == pytest.approx(0.1, abs=0.01)


def test_a_consumer_is_counted_with_what_its_producer_does_meanwhile() -> None:
    consumer = (".LBB0_1:", WMMA, BARRIER, WMMA, BARRIER, "s_cbranch_scc1 .LBB0_1", "s_branch .LBB0_3")
    producer = (".LBB0_2:", LOAD, BARRIER, "s_cbranch_scc1 .LBB0_2")
    lines = ("kernel:", "s_cbranch_scc0 .LBB0_2", *consumer, *producer, ".LBB0_3:", "s_endpgm")
    listing = parse_amdgcn("\n".join(lines))
    compiled: Any = SimpleNamespace(arch="gfx1151", launch=SimpleNamespace(constants={"PRODUCERS": True}))
    trips, paths = hot_paths(compiled, listing)
    assert trips == 1
    assert [[i.opcode for i in path].count("s_barrier") for path in paths] == [2, 2]
    assert [len(path) for path in paths] == [5, 6], "LLVM unrolled the consumer's loop"


@pytest.mark.parametrize(("blocks_m", "blocks_n", "raster"), [(5, 3, 4), (8, 2, 4), (3, 7, 0), (1, 4, 8)])
def test_every_block_has_one_program(blocks_m: int, blocks_n: int, raster: int) -> None:
    found = [block_of(program, blocks_m, blocks_n, raster) for program in range(blocks_m * blocks_n)]
    assert sorted(found) == list(itertools.product(range(blocks_m), range(blocks_n)))


def test_the_sources_ratios(sources: ModuleType) -> None:
    """Both changes that were faster are predicted to be, by within 15 % of what they gained."""
    for case in (*sources.subtractions(), *sources.tiles()):
        assert case.predicted_ratio < 1, case
        assert case.predicted_ratio == pytest.approx(case.ratio, rel=0.15), case
    for case in sources.unrolled():  # where it fails: 1 to 4 % were measured, the port is as busy without
        assert case.predicted_ratio == pytest.approx(1, abs=0.04), case


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
    assert told.busy > 0.98
    assert 33 <= told.tflops <= 38.6
