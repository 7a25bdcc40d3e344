"""Tuning rows, for every known device: what they cover, what they give, and the limits on it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

import w4a16.tuning
from w4a16 import DEVICES, Problem, Unsupported
from w4a16.codegen.cases import place_of
from w4a16.device import Device, known_device
from w4a16.tuning.table import covering_row, device_rows, row_for, rows_of, tile_for
from w4a16.tuning.tiles import DEQUANTS, TILES, CpuTile, DenseTile, PrefillTile, capped_block_k, why_illegal

TABLES = sorted(path.stem for path in Path(w4a16.tuning.__file__).parent.glob("*.toml"))
GPUS = [device for device in DEVICES.values() if device.arch != "cpu"]
ROWS_OF_X = (1, 5, 8, 16, 17, 32, 33, 64, 65, 96, 128, 129, 192, 256, 300, 400, 512, 600, 1024, 1025, 2047, 2048, 4096)
SHAPES = ((8, 64), (512, 2048), (1024, 512), (2560, 9728), (4096, 4096), (19456, 2560), (24576, 4096), (40, 18944))
GFX1151 = known_device("gfx1151")
PLAIN = PrefillTile(block_m=64, block_n=64, block_k=64, warps=4)


def problem(**fields: object) -> Problem:
    return Problem(**({"m": 64, "n": 4096, "k": 4096, "group": 128} | fields))  # type: ignore[arg-type]


def layer(stem: str) -> dict[str, int]:
    return {"experts": 64, "top_k": 4} if stem.endswith("_moe") else {}


@pytest.mark.parametrize("device", GPUS, ids=lambda d: d.arch)
def test_every_gpu_has_a_legal_prefill_tile_for_every_problem(device: Device) -> None:
    for m, (n, k), group, act in itertools.product(ROWS_OF_X, SHAPES, (16, 32, 64, 128, None), ("bf16", "fp16")):
        if k % (group or k) == 0:
            asked = problem(m=m, n=n, k=k, group=group or k, act=act)
            assert why_illegal("triton_prefill", tile_for("triton_prefill", asked, device), asked, device) is None


@pytest.mark.parametrize("table", TABLES)
def test_every_row_says_why_and_whether_it_was_measured(table: str) -> None:
    rows = rows_of(table)
    assert rows
    assert all(row.why and row.measured and isinstance(row.tile, TILES[row.stem]) for row in rows)


@pytest.mark.parametrize("table", [table for table in TABLES if table not in ("any", "cpu")])
def test_every_row_in_use_wins_somewhere(table: str) -> None:
    """A row behind one that covers as much would be dead."""
    device = known_device({"gfx11": "gfx1151", "gfx12": "gfx1201", "gfx9": "gfx942", "sm8": "sm80"}.get(table, table))
    shapes = (
        *SHAPES,
        (1536, 2048),
        (32768, 2048),
        (16384, 4096),
        (2048, 4096),
        (4096, 2048),
        (8192, 2048),
        (9728, 2560),
        (3584, 3584),
        (4096, 12288),
        (6144, 4096),
        (37888, 3584),
    )
    groups: tuple[int | None, ...] = (16, 32, 64, 128, None)
    found = (
        covering_row(stem, problem(m=m, n=n, k=k, group=g or k, act=act, has_zeros=zeros, **layer(stem)), device)
        for stem in {row.stem for row in rows_of(table)}
        for m, (n, k), g, act, zeros in itertools.product(ROWS_OF_X, shapes, groups, ("bf16", "fp16"), (False, True))
        if k % (g or k) == 0
    )
    won = {place_of(row) for row in found if row is not None}
    assert [row for row in rows_of(table) if row.use and place_of(row) not in won] == []


def test_rows_for_comparison_are_listed_and_never_taken() -> None:
    spare = [row for row in device_rows("triton_prefill", GFX1151) if not row.use]
    assert any("#879" in row.why for row in spare)
    assert not any(row.covers(problem(), GFX1151) for row in spare)


def test_a_device_reads_its_own_rows_then_its_familys_then_those_of_any() -> None:
    qwen = problem(m=600, n=19456, k=2560, act="fp16")
    assert row_for("triton_prefill", qwen, known_device("gfx1150")).table == "gfx1150"
    assert row_for("triton_prefill", replace(qwen, m=500), known_device("gfx1150")).table == "gfx11"
    assert row_for("triton_prefill", qwen, known_device("gfx942")).table == "any"
    assert row_for("triton_prefill", replace(qwen, act="bf16"), known_device("gfx1103")).table == "gfx1103"


@pytest.mark.parametrize(
    ("fields", "tile"),
    [
        ({"m": 16, "act": "fp16"}, (16, 64, 128, 4)),
        ({"m": 16, "n": 512, "act": "fp16"}, (32, 32, 128, 4)),
        ({"m": 64, "act": "fp16"}, (32, 128, 64, 4)),
        ({"m": 128, "n": 24576, "act": "fp16"}, (128, 128, 32, 8)),
        ({"m": 4096, "n": 2048, "act": "fp16"}, (64, 256, 32, 8)),
        ({"m": 32, "act": "bf16"}, (32, 32, 128, 4)),
        ({"m": 128, "n": 2048, "k": 4096, "act": "bf16"}, (64, 16, 64, 1)),
        ({"m": 1000, "n": 4096, "act": "bf16", "group": 4096}, (64, 128, 32, 4)),
        ({"m": 1000, "n": 16384, "act": "bf16", "group": 4096}, (128, 64, 64, 8)),
    ],
)
def test_the_gfx11_ladders_are_the_sources(fields: dict[str, object], tile: tuple[int, int, int, int]) -> None:
    got = tile_for("triton_prefill", problem(**fields), GFX1151)
    assert (got.block_m, got.block_n, got.block_k, got.warps) == tile


def test_a_kernel_without_a_tile_and_a_device_without_a_row() -> None:
    assert tile_for("cpu_moe", problem(), DEVICES["cpu"]) is None
    with pytest.raises(Unsupported, match=r"no tuning row of cpu_decode covers m=64 .* on gfx1151"):
        tile_for("cpu_decode", problem(), GFX1151)


@pytest.mark.parametrize(
    ("change", "fields", "arch", "sentence"),
    [
        ({"block_m": 48}, {}, "gfx1151", "power of two"),
        ({"warps": 32}, {}, "gfx1151", "at most 16"),
        ({"stages": 0}, {}, "gfx1151", "1 to 8"),
        ({"block_n": 8}, {}, "gfx1151", "at least 16"),
        ({}, {"group": 8}, "gfx1151", "group a multiple"),
        ({"dequant": "carrier"}, {}, "gfx1151", "does not serve bf16"),
        ({"dequant": "no_such_form"}, {}, "gfx1151", "does not serve bf16"),
        ({}, {"act": "fp32"}, "gfx1151", "does not serve fp32"),
        ({"pinned": True}, {}, "sm90", "AMD"),
        ({"block_m": 256, "block_n": 256}, {}, "gfx1151", "accumulator registers"),
        ({"block_m": 128, "dequant": "group_sum", "block_n": 128}, {}, "gfx1151", "accumulator registers"),
        ({"stages": 8, "block_k": 128}, {}, "sm86", "shared memory"),
    ],
)
def test_each_limit_has_its_sentence(
    change: dict[str, object], fields: dict[str, object], arch: str, sentence: str
) -> None:
    asked, device = problem(**fields), DEVICES[arch]
    assert why_illegal("triton_prefill", PLAIN, problem(), device) is None
    found = why_illegal("triton_prefill", replace(PLAIN, **change), asked, device)  # type: ignore[arg-type]
    assert found is not None
    assert sentence in found


def test_a_tile_of_another_kernel_is_illegal() -> None:
    found = why_illegal("triton_prefill", CpuTile(block_n=64), problem(), GFX1151)
    assert found == "triton_prefill takes a PrefillTile, not a CpuTile"
    assert why_illegal("dense", DenseTile(workspace_mib=64), problem(), GFX1151) is None
    assert why_illegal("dense", DenseTile(workspace_mib=0), problem(), GFX1151) is not None


@pytest.mark.parametrize(("block_k", "group", "got"), [(128, 32, 32), (32, 128, 32), (64, 96, 32), (64, 16, 16)])
def test_a_step_stays_within_a_group(block_k: int, group: int, got: int) -> None:
    assert capped_block_k(block_k, group) == got


def test_every_form_serves_some_dtype() -> None:
    assert all(set(acts) <= {"bf16", "fp16"} and acts for acts in DEQUANTS.values())
