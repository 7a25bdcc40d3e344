"""The benchmark of expert layers: archetypes of routing, providers checked before they are timed, its reports."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from w4a16 import BadInput
from w4a16.bench import expert_report
from w4a16.bench.command import main
from w4a16.bench.expert_cases import EXPERTS, ROUTINGS, ExpertShape, expert_shapes_of, random_experts, routed
from w4a16.bench.expert_providers import PROVIDERS, expert_providers_of
from w4a16.bench.expert_run import ExpertRefusal, ExpertResult, expected, run_experts
from w4a16.reference import reference_moe
from w4a16.roofline.model import Routing, flops, weight_bytes

SHAPE = ExpertShape(name="small", experts=8, top_k=2, hidden=128, inter=64, group=64)
LARGE = EXPERTS["qwen3-30b-a3b"]


def points(providers: str, tokens: tuple[int, ...] = (1, 9), **options: bool) -> list[ExpertResult | ExpertRefusal]:
    named = expert_providers_of(providers)
    return list(run_experts((SHAPE,), tokens, ("uniform", "zipf2"), named, rounds=3, **options))  # type: ignore[arg-type]


def test_shapes_by_model_and_by_size() -> None:
    (asked,) = expert_shapes_of("60x4x256x192")
    assert (asked.experts, asked.top_k, asked.hidden, asked.inter) == (60, 4, 256, 192)
    assert expert_shapes_of("qwen3-30b-a3b") == (LARGE,)
    assert all(s.hidden % s.group == 0 and s.inter % s.group == 0 for s in EXPERTS.values())
    for names in ("qwen3", "8x2", "qwen3-30b-a3b,"):
        with pytest.raises(BadInput, match="mixtral"):
            expert_shapes_of(names)
    with pytest.raises(BadInput, match="grouped_mm"):
        expert_providers_of("w4a16,marlin")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_give_each_token_distinct_experts(routing: str) -> None:
    ids = routed(routing, 300, LARGE, torch.Generator().manual_seed(1))
    again = routed(routing, 300, LARGE, torch.Generator().manual_seed(1))
    assert torch.equal(ids, again)
    assert ids.shape == (300, LARGE.top_k)
    assert ids.min() >= 0
    assert ids.max() < LARGE.experts
    assert all(len(row.unique()) == LARGE.top_k for row in ids)


def test_routings_differ_in_the_load_of_their_fullest_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    loads = {name: routed(name, 1024, LARGE, generator).flatten().bincount().max().item() for name in ROUTINGS}
    assert loads["balanced"] == 64
    assert loads["balanced"] < loads["uniform"] < loads["zipf1"] < loads["zipf2"]
    assert loads["uniform"] < loads["hot16"]


@pytest.mark.parametrize("asym", [False, True])
def test_every_provider_gives_a_result_or_a_sentence(asym: bool) -> None:
    found = points(",".join(PROVIDERS), has_zeros=asym)
    assert {(p.provider, p.problem.m) for p in found} == {(name, m) for name in PROVIDERS for m in (1, 9)}
    timed = [p for p in found if isinstance(p, ExpertResult)]
    assert {p.provider for p in timed} == {"w4a16", "cpu_moe", "grouped_mm"}
    assert all(p.seconds > 0 and p.error <= 12e-3 for p in timed)
    assert all((p.gemm_seconds is not None) == (p.provider == "grouped_mm") for p in timed)
    refused = {p.provider: p.sentence for p in found if isinstance(p, ExpertRefusal)}
    assert "not on cpu" in refused["triton_moe"]
    assert not any("wrong" in sentence for sentence in refused.values())


def test_points_left_out_leave_the_others_as_they_are() -> None:
    named = expert_providers_of("w4a16")
    both = run_experts((SHAPE,), (9, 30), ("zipf2",), named, rounds=2)
    (alone,) = run_experts((SHAPE,), (9, 30), ("zipf2",), named, rounds=2, only={("small.zipf2", 30)})
    assert isinstance(alone, ExpertResult)
    assert alone.problem.m == 30
    assert [p.work for p in both if isinstance(p, ExpertResult)][1] == alone.work
    assert not list(run_experts((SHAPE,), (9,), ("zipf2",), named, only=()))


def test_a_wrong_provider_is_not_timed() -> None:
    right = PROVIDERS["w4a16"]
    wrong = replace(right, prepare=lambda weights, act: replace(right.prepare(weights, act), layer=lambda x, *_: x))
    (point,) = run_experts((SHAPE,), (4,), ("uniform",), (wrong,), rounds=3)
    assert isinstance(point, ExpertRefusal)
    assert "relative RMS" in point.sentence


def test_some_rows_are_expected_from_their_experts_alone() -> None:
    weights = random_experts(SHAPE, act="bf16", has_zeros=True, device=torch.device("cpu"))
    x, shares = torch.randn(20, SHAPE.hidden).bfloat16(), torch.rand(20, SHAPE.top_k)
    ids = routed("uniform", 20, SHAPE, torch.Generator().manual_seed(0))
    rows = torch.tensor([3, 17])
    whole = reference_moe(x, *weights, shares, ids)
    assert torch.allclose(expected(x, weights, shares, ids, rows), whole[rows], rtol=1e-5, atol=1e-5)


def test_speeds_count_routed_rows_and_touched_experts() -> None:
    point = next(p for p in points("w4a16", tokens=(3,)) if isinstance(p, ExpertResult))
    assert point.work == Routing(slots=6, touched=point.work.touched, rows=6, intermediate=64)
    assert flops(point.problem, point.work) == 6 * 6 * 128 * 64
    assert point.tflops * point.seconds == pytest.approx(flops(point.problem, point.work) * 1e-12)
    assert point.gb_per_s * point.seconds == pytest.approx(weight_bytes(point.problem, point.work) * 1e-9)


def test_a_report_has_every_column() -> None:
    found = [p for p in points("w4a16,grouped_mm") if isinstance(p, ExpertResult)]
    rows = expert_report.rows(found)
    assert {len(row) for row in rows} == {len(expert_report.COLUMNS)}
    ratio = expert_report.COLUMNS.index("x grouped_mm")
    assert [row[ratio] for row in rows if "grouped_mm" in row] == ["1.000"] * 4
    assert expert_report.compact(found).count("\n") == 4


def test_the_command_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--{kind}={tmp_path / kind}" for kind in ("csv", "json", "markdown")]
    few = ["--moe", "--shapes=4x2x128x128", "--batches=2", "--routing=balanced,hot16", "--rounds=3", "--device=cpu"]
    assert main([*few, "--providers=w4a16,grouped_mm,sm90_moe", *files]) == 0
    assert "not timed: sm90_moe" in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "csv").read_text().splitlines()))
    assert [(line["routing"], line["tokens"], line["provider"]) for line in lines[::2]] == [
        ("balanced", "2", "w4a16"),
        ("hot16", "2", "w4a16"),
    ]
    assert len(json.loads((tmp_path / "json").read_text())["refused"]) == 2
    assert (tmp_path / "markdown").read_text().count("\n") == 6
    assert main([*few, "--routing=skewed"]) == 1
    assert main([*few, "--png=picture.png"]) == 1
    assert "BadInput" in capsys.readouterr().err
