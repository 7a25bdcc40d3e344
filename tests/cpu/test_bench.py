"""The benchmark: shapes by name, wrong results refused before timing, every form of its report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from w4a16 import BadInput
from w4a16.bench import report
from w4a16.bench.cases import MODELS, Shape, shapes_of
from w4a16.bench.command import main
from w4a16.bench.peers import copied
from w4a16.bench.providers import PROVIDERS, Provider, providers_of
from w4a16.bench.run import Refusal, Result, run
from w4a16.bench.timer import copies_for, spread_percent, time_calls
from w4a16.device import DEVICES
from w4a16.problem import Problem
from w4a16.roofline.model import bound_seconds, bytes_moved, flops

SHAPE = Shape(name="small", n=64, k=128, group=32)


def results(providers: str, **options: bool) -> list[Result | Refusal]:
    return list(run((SHAPE,), (1, 3), providers_of(providers), rounds=3, **options))  # type: ignore[arg-type]


def test_shapes_by_model_and_by_size() -> None:
    assert [(s.n, s.k) for s in shapes_of("8b")] == [(24576, 4096), (4096, 12288), (4096, 4096)]
    assert shapes_of("qwen3-4b,96x64")[-1] == Shape(name="96x64", n=96, k=64)
    assert all(s.k % s.group == 0 and s.n % 8 == 0 for shapes in MODELS.values() for s in shapes)


@pytest.mark.parametrize("names", ["8c", "8b,", "12x"])
def test_unknown_shapes_are_refused(names: str) -> None:
    with pytest.raises(BadInput, match="qwen3-8b"):
        shapes_of(names)


def test_one_round_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", "1"])
    assert "got 1, wanted 2 or more: one has no spread" in capsys.readouterr().err


def test_unknown_providers_are_refused() -> None:
    with pytest.raises(BadInput, match="cublas"):
        providers_of("w4a16,marlin")


@pytest.mark.parametrize("asym", [False, True])
def test_every_provider_gives_a_result_or_a_sentence(asym: bool) -> None:
    points = results(",".join(PROVIDERS), has_zeros=asym)
    assert {(p.provider, p.problem.m) for p in points} == {(name, m) for name in PROVIDERS for m in (1, 3)}
    assert all(p.seconds > 0 and p.error <= 4e-3 for p in points if isinstance(p, Result))
    refused = {p.provider: p.sentence for p in points if isinstance(p, Refusal)}
    assert "NVIDIA" in refused["tinygemm"]
    assert not any("wrong" in sentence for sentence in refused.values())


def instead_of_cublas(answer: Callable[[Tensor], Tensor]) -> Provider:
    return replace(PROVIDERS["cublas"], prepare=lambda weight, act, copies: [answer] * copies)


def test_a_wrong_provider_is_not_timed() -> None:
    points = list(run((SHAPE,), (2,), (instead_of_cublas(lambda x: x.new_ones(len(x), SHAPE.n)),), rounds=3))
    assert [type(p) for p in points] == [Refusal]
    assert "relative RMS" in points[0].sentence  # type: ignore[union-attr]


def test_a_provider_that_returns_nan_is_wrong() -> None:
    bad = instead_of_cublas(lambda x: x.new_full((len(x), SHAPE.n), torch.nan))
    assert isinstance(next(iter(run((SHAPE,), (2,), (bad,), rounds=3))), Refusal)


def test_copies_keep_their_strides() -> None:
    padded = torch.arange(24).view(4, 6)[:, :5]
    again = copied(padded)
    assert torch.equal(again, padded)
    assert again.stride() == padded.stride()
    assert again.data_ptr() != padded.data_ptr()


def test_reports_agree() -> None:
    points = [p for p in results("w4a16,cublas") if isinstance(p, Result)]
    columns, rows = report.COLUMNS, report.rows(points)
    table = list(csv.reader(io.StringIO(report.as_csv(columns, rows))))
    assert tuple(table[0]) == columns
    assert [tuple(row) for row in table[1:]] == rows
    assert len(json.loads(report.as_json(columns, rows, []))["results"]) == len(points)
    markdown = report.as_markdown(columns, rows)
    assert markdown.count("\n") == len(points) + 2
    assert len({line.count("|") for line in markdown.splitlines()}) == 1
    assert "small" in report.compact(points)


def test_the_ratio_is_cublas_time_over_the_providers() -> None:
    points = [p for p in results("w4a16,cublas") if isinstance(p, Result)]
    doubled = [replace(p, seconds=2.0 if p.provider == "w4a16" else 1.0) for p in points]
    ratio = report.COLUMNS.index("x cublas")
    assert {(row[7], row[ratio]) for row in report.rows(doubled)} == {("w4a16", "0.500"), ("cublas", "1.000")}


def test_the_command_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--{kind}={tmp_path / kind}" for kind in ("csv", "json", "markdown")]
    shape = ["--shapes=64x128", "--batches=1", "--providers=w4a16,cublas,tinygemm", "--rounds=3", "--device=cpu"]
    assert main([*shape, *files]) == 0
    assert "not timed: tinygemm" in capsys.readouterr().out
    assert all((tmp_path / kind).stat().st_size for kind in ("csv", "json", "markdown"))
    assert main(["--shapes=nothing"]) == 1
    assert "BadInput" in capsys.readouterr().err


def test_timing_rotates_copies_and_interleaves() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: (lambda copy, name=name: seen.append((name, copy))) for name in "ab"}
    seconds = time_calls(calls, {"a": 2, "b": 3}, torch.device("cpu"), rounds=4)
    assert all(len(times) == 4 for times in seconds.values())
    assert {copy for name, copy in seen if name == "b"} == {0, 1, 2}
    order = [name for name, _ in seen[2:]]
    assert order.index("b") < len(order) - 1 - order[::-1].index("a")


def test_copies_fill_more_than_a_cache() -> None:
    assert copies_for(8 << 20) * (8 << 20) >= 256 << 20
    assert copies_for(1 << 40) == 2
    assert spread_percent([1.0, 1.0, 1.0, 1.0]) == 0


def test_the_bound_is_the_larger_of_bytes_and_flops() -> None:
    h100 = DEVICES["sm90"]
    decode, prefill = (Problem(m=m, n=24576, k=4096, group=128) for m in (1, 4096))
    assert bytes_moved(decode) == 24576 * 4096 // 2 + 24576 * 32 * 2 + 2 * (4096 + 24576)
    assert bound_seconds(decode, h100) == bytes_moved(decode) / h100.memory_bytes_per_s
    assert bound_seconds(prefill, h100) == flops(prefill) / h100.matrix_flops
    assert bound_seconds(decode, DEVICES["cpu"]) == 0
