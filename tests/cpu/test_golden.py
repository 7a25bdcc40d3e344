"""The regression gate: what closes it, what is only reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from w4a16.bench import gate, golden
from w4a16.bench.golden import Row, compare, merge, noisy, read, write
from w4a16.errors import NoGolden

ROW = Row(kernel="k", case="llama.qkv", m=16, act="bf16", zero_point=1, median_us=100.0, spread_pct=0.5)


def sentences(golden_row: Row, measured: list[Row]) -> list[tuple[str, bool]]:
    return [(finding.sentence, finding.fails) for finding in compare([golden_row], measured)]


@pytest.mark.parametrize(("now", "fails"), [(102.9, []), (103.1, [True]), (97.5, []), (90.0, [False])])
def test_three_per_cent_is_the_least_allowed_loss(now: float, fails: list[bool]) -> None:
    assert [f for _, f in sentences(ROW, [replace(ROW, median_us=now)])] == fails


def test_a_rows_own_spread_widens_it() -> None:
    loose = replace(ROW, spread_pct=2.0)
    assert not sentences(loose, [replace(loose, median_us=105.9)])
    assert sentences(loose, [replace(loose, median_us=106.1)])


def test_another_kernel_fails_even_when_faster() -> None:
    (sentence, fails), *_ = sentences(ROW, [replace(ROW, kernel="other", median_us=50.0)])
    assert fails
    assert "k ran before, other now" in sentence


def test_missing_and_unrecorded_cases_fail() -> None:
    assert [fails for _, fails in sentences(ROW, [])] == [True]
    assert [fails for _, fails in sentences(ROW, [ROW, replace(ROW, m=17)])] == [True]


def test_processes_merge_into_a_median_and_half_the_range() -> None:
    merged = merge([replace(ROW, median_us=us) for us in (98.0, 100.0, 104.0)])
    assert (merged.median_us, merged.spread_pct) == (100.0, 3.0)
    with pytest.raises(NoGolden, match="kernels"):
        merge([ROW, replace(ROW, kernel="other")])


def test_rows_that_would_let_ten_per_cent_pass_are_noisy() -> None:
    assert noisy([ROW, replace(ROW, spread_pct=3.4)]) == [replace(ROW, spread_pct=3.4)]


def test_a_file_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "h100" / "linear.csv"
    rows = [ROW, replace(ROW, m=1)]
    write(path, rows, "an H100 of today")
    assert path.read_text().startswith("# an H100 of today\nkernel,case,m,act,zero_point,median_us,spread_pct\n")
    assert sorted(read(path), key=lambda row: row.m) == [replace(ROW, m=1), ROW]


def test_without_a_file_the_error_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(NoGolden, match="golden update"):
        read(tmp_path / "none.csv")


def test_the_command_updates_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On this CPU, of which the file may have any name; a doctored file closes the gate."""
    few = ["--folder", str(tmp_path), "--shapes=64x128", "--batches=1", "--act=bf16", "--zeros=sym", "--rounds=2"]
    assert gate.main(["update", *few]) == 2
    assert gate.main(["check", *few]) == 1
    assert "NoGolden" in capsys.readouterr().err
    assert gate.main(["update", *few, "--reason", "a test", "--processes", "1"]) == 2
    assert gate.main(["update", *few, "--reason", "a test"]) == 0
    (path,) = tmp_path.glob("*/linear.csv")
    assert "a test" in path.read_text()
    slow = [replace(row, median_us=1e9) for row in read(path)]
    write(path, slow, "a slow machine")
    assert gate.main(["check", *few]) == 0
    write(path, [replace(row, median_us=1e-3) for row in slow], "a fast machine")
    assert gate.main(["check", *few]) == 1
    assert "1 recorded, 1 measured, 1 failed" in capsys.readouterr().out


def test_measuring_asks_for_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([100.0, 103.0, 101.0])
    monkeypatch.setattr(golden, "_one_process", lambda options: {ROW.key: replace(ROW, median_us=next(runs))})
    assert [row.median_us for row in golden.measure(["--act=bf16"], 3)] == [101.0]
