"""serve-bench: interleaved repetitions, and a verdict only where the difference exceeds the spread."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_cli import invoke
from typer.testing import CliRunner

import w4a16.bench.serving as serving
from w4a16.bench.serving import Load, Metric, compare, interleave, order, run_once
from w4a16.cli import app
from w4a16.errors import BadInput, Unsupported

LATENCY = Metric(key="t", name="t")
SPEED = Metric(key="t", name="t", more_is_better=True)
LOAD = Load(model="m", kind="latency", input_len=8, output_len=4, prompts=2, seed=3, engine=("--enforce-eager",))

FAKE = """
import http.server, json, os, sys
from pathlib import Path
arguments, on = sys.argv[1:], os.environ["W4A16_VLLM"] == "1"

def given(name):
    return arguments[arguments.index(name) + 1]

def note(what):
    with open(Path(__file__).with_name("runs"), "a") as out:
        print(what, "on" if on else "off", given("--seed"), file=out)

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

if not on and "--refuse" in arguments:
    sys.exit("this vLLM cannot")
if arguments[0] == "serve":
    note("server")
    try:
        http.server.HTTPServer(("127.0.0.1", int(given("--port"))), Health).serve_forever()
    except KeyboardInterrupt:
        sys.exit()
note(arguments[1])
if arguments[1] == "latency":
    file, figures = given("--output-json"), {"avg_latency": 1.0 if on else 2.0}
else:
    file = Path(given("--result-dir"), given("--result-filename"))
    figures = dict.fromkeys(["median_ttft_ms", "median_tpot_ms", "median_itl_ms", "output_throughput"], 1.0 + on)
    figures["completed"] = int(given("--num-prompts")) if on or given("--model") != "broken" else 0
Path(file).write_text(json.dumps(figures | {"argv": arguments}))
"""


def test_the_order_turns() -> None:
    assert list(order(3)) == [True, False, False, True, True, False]


def test_calls_in_that_order_each_repetition_with_its_own_seed() -> None:
    calls: list[tuple[bool, int]] = []

    def once(load: Load, on: bool) -> dict[str, float]:
        calls.append((on, load.seed))
        return {"t": float(len(calls))}

    found = interleave(LOAD, 2, once)
    assert calls == [(True, 3), (False, 3), (False, 4), (True, 4)]
    assert [run["t"] for run in found[True]] == [1, 4]


@pytest.mark.parametrize(
    ("on", "off", "metric", "verdict"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], LATENCY, "w4a16 is 1.91x better"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], LATENCY, "vLLM alone is 1.91x better"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], SPEED, "w4a16 is 1.91x better"),
        ([1.0, 1.1, 1.6], [1.2, 1.3, 1.4], LATENCY, "no difference beyond the spread"),
        ([0.1, 0.143, 0.194], [0.043, 0.043, 0.107], LATENCY, "no difference beyond the spread"),
        ([1.0, 1.0], [2.0, 2.0], LATENCY, "none: 3 repetitions"),
    ],
)
def test_verdict(on: list[float], off: list[float], metric: Metric, verdict: str) -> None:
    (row,) = compare({True: [{"t": t} for t in on], False: [{"t": t} for t in off]}, [metric])
    assert row.verdict.startswith(verdict)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A vLLM that answers at once; the file in which it notes what it was asked."""
    script = tmp_path / "vllm.py"
    script.write_text(FAKE)
    monkeypatch.setattr(serving, "VLLM", (sys.executable, str(script)))
    monkeypatch.setattr("w4a16.cli_serve.need_vllm", lambda: None)
    return tmp_path / "runs"


@pytest.mark.usefixtures("fake")
def test_one_run() -> None:
    figures = run_once(LOAD, True)
    argv = figures["argv"]
    assert argv[:4] == ["bench", "latency", "--model", "m"]
    assert argv[argv.index("--seed") + 1] == "3"
    assert argv[-1] == "--enforce-eager"


@pytest.mark.usefixtures("fake")
def test_a_side_that_fails_is_an_error_with_its_log() -> None:
    with pytest.raises(Unsupported, match=r"without w4a16 \(W4A16_VLLM=0\)[^$]*this vLLM cannot"):
        run_once(Load(**{**vars(LOAD), "engine": ("--refuse",)}), False)


@pytest.mark.usefixtures("fake")
def test_an_engine_that_dies_while_it_serves_is_an_error() -> None:
    with pytest.raises(Unsupported, match=r"without w4a16 \(W4A16_VLLM=0\)[^$]* answered 0 of 2 requests"):
        run_once(Load(**{**vars(LOAD), "kind": "serve", "model": "broken"}), False)


@pytest.mark.usefixtures("fake")
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    said = invoke("serve-bench", "m", "--kind", "latency", "--repeats", 3, "--json", out, "--enforce-eager")
    assert "w4a16 is 2.00x better" in said
    found = json.loads(out.read_text())
    assert found["runs"] == {"w4a16": [{"avg_latency": 1.0}] * 3, "vLLM alone": [{"avg_latency": 2.0}] * 3}


@pytest.mark.parametrize("keep", [False, True])
def test_servers_start_once_or_for_each_run(keep: bool, fake: Path) -> None:
    said = invoke("serve-bench", "m", "--repeats", 3, *["--keep"][:keep])
    assert said.count("w4a16 is 2.00x better") == 1, "more tokens a second are better"
    assert said.count("vLLM alone is 2.00x better") == 3
    runs = [line.split() for line in fake.read_text().splitlines()]
    counted = [(side, str(seed)) for seed, sides in enumerate(("on off", "off on", "on off")) for side in sides.split()]
    assert [(on, seed) for what, on, seed in runs if what == "serve"] == [
        *[("on", "3"), ("off", "3")][: 2 * keep],
        *counted,
    ]
    assert sorted(on for what, on, _ in runs if what == "server") == sorted(["on", "off"] * (1 if keep else 3))


def test_only_servers_are_kept() -> None:
    with pytest.raises(BadInput, match="got --kind latency, wanted --kind serve"):
        CliRunner().invoke(app, ["serve-bench", "m", "--kind", "latency", "--keep"], catch_exceptions=False)


@pytest.mark.parametrize("arguments", [["serve-bench", "m", "--kind", "x"], ["serve", "m", "--engine", "x"]])
def test_unknown_words(arguments: list[str]) -> None:
    with pytest.raises(BadInput, match="got x, wanted"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("arguments", [["serve-bench", "m"], ["serve", "m", "--engine", "vllm"]])
def test_without_vllm(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="needs vLLM, which is not installed"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
