"""`w4a16 tune`: tiles from a grid, wrong and illegal ones refused, the best first."""

from __future__ import annotations

import pytest
import torch

from w4a16 import BadInput
from w4a16.bench.cases import Shape
from w4a16.bench.run import random_weight
from w4a16.tuning import search
from w4a16.tuning.tiles import CpuTile, PrefillTile

WEIGHT = random_weight(Shape(name="small", n=64, k=128), act="bf16", has_zeros=True, device=torch.device("cpu"))


def test_a_grid_is_every_combination() -> None:
    tiles = list(
        search.tiles_of("triton_prefill", "block_m=64,128 block_n=64 block_k=32 warps=4,8 dequant=int_subtract")
    )
    assert len(tiles) == 4
    assert tiles[0] == PrefillTile(block_m=64, block_n=64, block_k=32, warps=4)
    with pytest.raises(BadInput, match="block_m"):
        list(search.tiles_of("triton_prefill", "blok_m=64"))


def test_tiles_are_sorted_by_time_with_blas_among_them() -> None:
    tiles = [CpuTile(block_n=8), CpuTile(block_n=64)]
    found = search.search("cpu_decode", WEIGHT, 1, "bf16", tiles, rounds=3)
    assert [t.seconds for t in found] == sorted(t.seconds for t in found)
    assert {repr(t.tile) for t in found} == {"None", *map(repr, tiles)}


def test_a_tile_that_is_wrong_or_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*, out: torch.Tensor, tile: CpuTile, **_: object) -> None:
        if tile.block_n == 8:
            raise RuntimeError("out of resources")
        out.zero_()

    monkeypatch.setattr(search, "launcher", lambda stem: launch)
    found = search.search("cpu_decode", WEIGHT, 1, "bf16", [CpuTile(block_n=8), CpuTile(block_n=64)], rounds=3)
    assert found[0].tile is None
    refused = " ".join(str(t.refused) for t in found)
    assert "out of resources" in refused
    assert "relative RMS" in refused


def test_the_command_prints_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "precompile", lambda *_: None)
    grid = ["--kernel=cpu_decode", "--grid", "block_n=8,64", "--shapes=64x128", "--batches=1", "--device=cpu"]
    assert search.main([*grid, "--rounds=3"]) == 0
    printed = capsys.readouterr().out
    assert "{ block_n = " in printed
    assert printed.count("today's") == 1
    assert search.main(["--kernel=cpu_decode", "--grid", "rows=8"]) == 1
    assert "BadInput" in capsys.readouterr().err
