"""The regression gate: what closes it, what is only reported."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from w4a16.bench import gate, golden
from w4a16.bench.golden import Row, compare, merge, noisy, read, write
from w4a16.bench.golden_table import linear_table
from w4a16.bench.warm import compile_all, distinct
from w4a16.device import known_device
from w4a16.errors import NoGolden
from w4a16.problem import Problem

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


FEW = {
    "linear": ["--shapes=64x128", "--batches=1"],
    "experts": ["--experts=4x2x128x128", "--tokens=1", "--routing=uniform"],
}


@pytest.mark.parametrize("table", sorted(FEW))
def test_the_command_updates_and_checks(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On this CPU, of which the file may have any name; a doctored file closes the gate."""
    few = ["--folder", str(tmp_path), "--tables", table, *FEW[table], "--act=bf16", "--zeros=sym", "--rounds=2"]
    assert gate.main(["update", *few]) == 2
    assert gate.main(["check", *few]) == 1
    assert "NoGolden" in capsys.readouterr().err
    assert gate.main(["update", *few, "--reason", "a test", "--processes", "1"]) == 2
    assert gate.main(["update", *few, "--reason", "a test", "--processes", "2"]) == 0
    (path,) = tmp_path.glob(f"*/{table}.csv")
    assert "a test" in path.read_text()
    slow = [replace(row, median_us=1e9) for row in read(path)]
    write(path, slow, "a slow machine")
    assert gate.main(["check", *few]) == 0
    write(path, [replace(row, median_us=1e-3) for row in slow], "a fast machine")
    assert gate.main(["check", *few]) == 1
    said = capsys.readouterr().out
    assert "1 cases in 2 more processes" in said
    assert "1 recorded, 1 measured, 1 failed" in said


def test_only_some_points_are_measured() -> None:
    linear = golden.Process(
        ["--shapes=64x128,128x128", "--batches=1,2", "--act=bf16,fp16", "--rounds=2", "--device=cpu"]
    )
    keys = {("64x128", 2, "fp16", 0), ("128x128", 1, "bf16", 0)}
    assert set(linear.rows(keys)) == keys
    linear.close()


def test_a_part_is_checked_alone(tmp_path: Path) -> None:
    few = gate.parser().parse_args(["check", "--folder", str(tmp_path), "--shapes=qwen3-1.7b", "--experts=8x2x128x128"])
    linear, experts = gate._linear(few), gate._experts(few)
    assert len(linear.asked) == len(linear.problems) == 3 * 13 * 4
    assert len(experts.asked) == 2 * len(experts.problems) == 2 * 7 * 4
    assert ("8x2x128x128.zipf2", 1, "fp16", 1) in experts.asked


def test_processes_merge_case_by_case() -> None:
    runs = [{ROW.key: replace(ROW, median_us=us)} for us in (100.0, 103.0, 101.0)]
    assert [row.median_us for row in golden.merged(runs)] == [101.0]


def test_sessions_merge_into_the_spread_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Machine A and machine B each keep what their processes measured; a third place merges."""
    table = tmp_path / "h100" / "linear.csv"
    for machine, times in (("A", (100.0, 101.0)), ("B", (106.0, 105.0))):
        for number, us in enumerate(times):
            kept = table.parent / "raw" / f"linear-{machine}-{number}.csv"
            write(kept, [replace(ROW, median_us=us)], f"an H100, {machine}")
    merge_only = ["update", "--folder", str(tmp_path), "--product", "h100", "--tables", "linear", "--processes", "0"]
    assert gate.main([*merge_only, "--reason", "two machines"]) == 2
    assert gate.main([*merge_only, "--merge"]) == 2
    assert gate.main([*merge_only, "--merge", "--reason", "two machines"]) == 0
    assert "1 cases of 4 processes" in capsys.readouterr().out
    assert read(table) == [replace(ROW, median_us=103.0, spread_pct=2.91)]
    assert golden.session_of(table) == "an H100, A | an H100, B"


def test_a_process_that_fails_ends_the_measurement() -> None:
    process = golden.Process(["--shapes=nothing"])
    with pytest.raises(subprocess.CalledProcessError):
        process.rows()
    process.close()


def test_every_code_is_compiled_once() -> None:
    """Row counts share a code where a kernel does not specialise on them."""
    h100 = known_device("sm90")
    problem = Problem(m=3, n=4096, k=4096, group=128)
    same = replace(problem, m=2)
    assert len(distinct([problem, problem], h100)) == len(distinct([problem, same], h100)) == 1
    assert len(distinct([problem, replace(problem, act="fp16"), replace(problem, has_zeros=True)], h100)) == 3
    assert compile_all([problem], known_device("cpu")) == 0


def test_the_readme_shows_the_golden_files(tmp_path: Path) -> None:
    """Written again, nothing changes."""
    root = Path(__file__).parents[2]
    copy = tmp_path / "README.md"
    copy.write_text((root / "README.md").read_text())
    assert gate.main(["table", "--folder", str(root / "golden"), "--product", "h100", "--readme", str(copy)]) == 0
    assert copy.read_text() == (root / "README.md").read_text()


def test_tables_of_golden_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what is recorded; a case that is not has an empty cell, a product without peaks no share of a bound."""
    kinds = ((1, "bf16", 0, 20.0), (1, "fp16", 0, 21.0), (64, "bf16", 0, 30.0), (64, "fp16", 0, 60.0))
    o = replace(ROW, case="qwen3-8b.o")
    rows = [replace(o, m=m, act=act, zero_point=zero, median_us=us) for m, act, zero, us in kinds]
    write(tmp_path / "x1" / "linear.csv", rows, "a session")
    experts = [replace(ROW, case="qwen3-30b-a3b.zipf2", m=4, zero_point=0, median_us=1234.5)]
    write(tmp_path / "x1" / "experts.csv", experts, "a session")
    assert gate.main(["table", "--folder", str(tmp_path), "--product", "x1"]) == 0
    said = capsys.readouterr().out
    assert "| qwen3-8b.o | 4096x4096 | 128 | 20 |  |  | 30 |  |  |  |\n" in said
    assert "| qwen3-30b-a3b | zipf2 |  | 1234 |" in said
    assert "fp16 symmetric 1.05 to 16 rows and 2.00 beyond.\n" in said
    text = tmp_path / "text.md"
    text.write_text("a\n<!-- golden x1 -->\nold\n<!-- end of golden x1 -->\nb\n")
    assert gate.main(["table", "--folder", str(tmp_path), "--product", "x1", "--readme", str(text)]) == 0
    assert text.read_text() == f"a\n<!-- golden x1 -->\n{said[:-1]}<!-- end of golden x1 -->\nb\n"
    text.write_text("nothing")
    assert gate.main(["table", "--folder", str(tmp_path), "--product", "x1", "--readme", str(text)]) == 1
    assert "got no such markers" in capsys.readouterr().err


def test_the_share_of_the_bound_is_of_the_products_peaks() -> None:
    h100 = known_device("sm90")
    assert h100.memory_bytes_per_s
    half = 0.5e-6 * h100.memory_bytes_per_s  # bytes in half a microsecond
    row = replace(ROW, case="qwen3-8b.o", m=1, zero_point=0)
    bytes_ = 4096 * 4096 // 2 + 4096 * 32 * 2 + 2 * 8192
    shown = linear_table([replace(row, median_us=bytes_ / half)], h100)
    assert "(50 %)" in shown
