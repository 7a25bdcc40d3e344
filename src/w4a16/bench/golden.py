"""The regression gate: what w4a16 measured on a device before, against what it measures now.

golden/<device>/linear.csv and experts.csv hold a measured case a line under a comment that names the session. `check`
fails on a case that is slower than its own spread allows, runs another kernel, or is missing; a faster one is only
reported. `update` measures every case again: one file, one session.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import NoGolden

LOSS_PERCENT = 3.0  # allowed whatever the spread
SPREADS = 3.0  # allowed loss in recorded spreads
NOISY_PERCENT = 10.0  # a row that would allow more than this is to be repaired


Key = tuple[str, int, str, int]  # case, m, act, zero_point
Run = dict[Key, "Row"]  # of one process


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case: the kernel that dispatch chose, its median over processes, half the range of their medians."""

    kernel: str
    case: str
    m: int
    act: str
    zero_point: int
    median_us: float
    spread_pct: float

    @property
    def key(self) -> Key:
        return self.case, self.m, self.act, self.zero_point

    @property
    def allowed_percent(self) -> float:
        return max(LOSS_PERCENT, SPREADS * self.spread_pct)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One case that is not as recorded. Only `fails` ones close the gate."""

    key: Key
    sentence: str
    fails: bool


class Process:
    """One process that measures what the bench options name. It gets ready at once, and waits for `rows`."""

    def __init__(self, options: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name, "points.csv")
        command = [sys.executable, "-m", "w4a16.bench", "--wait", *options, "--providers", "w4a16", "--csv"]
        self._run = subprocess.Popen(
            [*command, str(self._path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_until_ready(self) -> None:
        """Returns when it uses no device, nor will before `rows`."""
        assert self._run.stdout is not None
        self._run.stdout.readline()

    def rows(self, only: Iterable[Key] | None = None) -> Run:
        """Measures all, or some, and ends the process. Raises CalledProcessError when it fails, in words of its own."""
        self._run.communicate(json.dumps(None if only is None else sorted(only)) + "\n")
        if self._run.returncode:
            raise subprocess.CalledProcessError(self._run.returncode, self._run.args)
        points = list(csv.DictReader(self._path.read_text().splitlines()))
        rows = [_row(point) for point in points]
        return {row.key: row for row in rows}

    def close(self) -> None:
        self._run.kill()
        self._run.wait()
        self._folder.cleanup()


def merged(runs: Sequence[Run]) -> list[Row]:
    """The rows of processes with the same options, here or on other machines of one kind; a case may be left out."""
    keys = dict.fromkeys(key for run in runs for key in run)
    return [merge([run[key] for run in runs if key in run]) for key in keys]


def merge(rows: Sequence[Row]) -> Row:
    """One row of several processes' rows of the same case. Raises NoGolden when their kernels differ."""
    kernels = {row.kernel for row in rows}
    if len(kernels) > 1:
        raise NoGolden(f"{rows[0].key}: got kernels {sorted(kernels)} in equal processes, wanted one. Fix dispatch.")
    times = [row.median_us for row in rows]
    middle = statistics.median(times)
    spread = 50 * (max(times) - min(times)) / middle
    return Row(**{**vars(rows[0]), "median_us": round(middle, 2), "spread_pct": round(spread, 2)})


def compare(golden: Iterable[Row], measured: Iterable[Row]) -> list[Finding]:
    """Every difference between a golden file and a new measurement of the same cases."""
    now = {row.key: row for row in measured}
    found = []
    for row in golden:
        new = now.pop(row.key, None)
        if new is None:
            found.append(Finding(key=row.key, sentence="recorded, but not measured now (wrong or refused)", fails=True))
            continue
        if new.kernel != row.kernel:
            found.append(Finding(key=row.key, sentence=f"{row.kernel} ran before, {new.kernel} now", fails=True))
        change = 100 * (new.median_us / row.median_us - 1)
        sentence = f"{row.median_us:.2f} us before, {new.median_us:.2f} now: {change:+.1f} %"
        if change > row.allowed_percent:
            allowed = f", allowed {row.allowed_percent:.1f} %"
            found.append(Finding(key=row.key, sentence=sentence + allowed, fails=True))
        elif change < -row.allowed_percent:
            found.append(Finding(key=row.key, sentence=sentence, fails=False))
    found += [Finding(key=key, sentence="measured, but not recorded", fails=True) for key in now]
    return found


def noisy(rows: Iterable[Row]) -> list[Row]:
    """Rows whose spread would let a large loss pass."""
    return [row for row in rows if row.allowed_percent > NOISY_PERCENT]


def write(path: Path, rows: Iterable[Row], session: str) -> None:
    """Writes a golden file whole, `session` as its first line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    writer.writerows([*vars(row).values()] for row in sorted(rows, key=lambda row: row.key))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {session}\n{text.getvalue()}")


def read(path: Path) -> list[Row]:
    """The rows of a golden file. Raises NoGolden when there is none."""
    if not path.is_file():
        raise NoGolden(f"{path}: got no such file, wanted golden numbers. Run `w4a16 golden update` on this device.")
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Row)}
    return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(lines)]


def session_of(path: Path) -> str:
    """The session that a file's first line names."""
    return path.read_text().split("\n", 1)[0].removeprefix("# ")


def keep(path: Path, runs: Sequence[Run], session: str) -> None:
    """Keeps what each process measured in raw/<table>-<stamp>-<number>.csv, to be merged with other sessions."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    for number, run in enumerate(runs):
        write(path.parent / "raw" / f"{path.stem}-{stamp}-{number}.csv", run.values(), session)


def kept(path: Path) -> dict[Path, Run]:
    """What processes measured for this table before, by file."""
    files = sorted((path.parent / "raw").glob(f"{path.stem}-*.csv"))
    return {file: {row.key: row for row in read(file)} for file in files}


def _row(point: dict[str, str]) -> Row:
    """A line of `w4a16 bench --csv`, or of `--moe`, whose case names the routing too."""
    return Row(
        kernel=point["kernel"],
        case=f"{point['shape']}.{point['routing']}" if "routing" in point else point["shape"],
        m=int(point["tokens" if "routing" in point else "M"]),
        act=point["act"],
        zero_point=int(point["zeros"] == "asym"),
        median_us=float(point["us"]),
        spread_pct=0.0,
    )
