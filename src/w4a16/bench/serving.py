"""vLLM's own benchmarks with w4a16 and without: same seeds, repetitions interleaved, a verdict only beyond the spread.

The order turns each time (on off, off on, ...), so that a machine that slows down or speeds up over the minutes does so
to both. Every repetition starts a fresh engine, or both engines stay up and take turns.
"""

from __future__ import annotations

import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..env import with_plugin
from ..errors import Unsupported

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
START_S, STOP_S, TAIL = 1800, 30, 1500
LEAST_REPEATS = 3  # fewer say nothing about the spread
ON, OFF = "w4a16", "vLLM alone"
Figures = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of vLLM's result file."""

    key: str
    name: str
    more_is_better: bool = False


METRICS = {
    "serve": (
        Metric(key="median_ttft_ms", name="TTFT ms"),
        Metric(key="median_tpot_ms", name="TPOT ms"),
        Metric(key="median_itl_ms", name="ITL ms"),
        Metric(key="output_throughput", name="tokens/s", more_is_better=True),
    ),
    "latency": (Metric(key="avg_latency", name="latency s"),),
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the engine. `engine` are further arguments of `vllm serve` or `vllm bench latency`.

    keep: both servers stay up for all repetitions.
    """

    model: str
    kind: str
    input_len: int
    output_len: int
    prompts: int
    seed: int
    engine: tuple[str, ...] = ()
    keep: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric: medians and spreads (largest less smallest) of both sides, and what follows."""

    name: str
    on: float
    off: float
    spread_on: float
    spread_off: float
    verdict: str


def order(repeats: int) -> Iterator[bool]:
    """With w4a16 or without, run by run."""
    for repeat in range(repeats):
        first = repeat % 2 == 0
        yield first
        yield not first


def measure(load: Load, repeats: int) -> dict[bool, list[Figures]]:
    """The figures of every run by side."""
    if not load.keep:
        return interleave(load, repeats, run_once)
    with _serving(load, (True, False)) as ports:
        for on, port in ports.items():  # not counted: an engine's first requests pay for what none after them does
            _ask(replace(load, seed=load.seed + repeats), on, port)
        return interleave(load, repeats, lambda load, on: _ask(load, on, ports[on]))


def interleave(load: Load, repeats: int, once: Callable[[Load, bool], Figures]) -> dict[bool, list[Figures]]:
    """Each repetition has a seed of its own, or a server that stays up would answer it from its prefix cache."""
    found: dict[bool, list[Figures]] = {True: [], False: []}
    for on in order(repeats):
        found[on].append(once(replace(load, seed=load.seed + len(found[on])), on))
    return found


def compare(found: Mapping[bool, Sequence[Figures]], metrics: Sequence[Metric]) -> list[Row]:
    return [
        _row(metric, *([figures[metric.key] for figures in found[on]] for on in (True, False))) for metric in metrics
    ]


def _row(metric: Metric, on: list[float], off: list[float]) -> Row:
    middle_on, middle_off = statistics.median(on), statistics.median(off)
    spread_on, spread_off = max(on) - min(on), max(off) - min(off)
    difference = middle_on - middle_off
    # the larger spread alone found a 3.3-fold difference between two equal engines on a busy machine
    both = spread_on + spread_off
    if min(len(on), len(off)) < LEAST_REPEATS:
        verdict = f"none: {LEAST_REPEATS} repetitions say what the spread is"
    elif abs(difference) <= both:
        verdict = "no difference beyond the spread"
    else:
        better = ON if (difference > 0) == metric.more_is_better else OFF
        verdict = f"{better} is {max(middle_on, middle_off) / min(middle_on, middle_off):.2f}x better"
    return Row(
        name=metric.name, on=middle_on, off=middle_off, spread_on=spread_on, spread_off=spread_off, verdict=verdict
    )


def run_once(load: Load, on: bool) -> Figures:
    """One run of vLLM's benchmark on a fresh engine; raises Unsupported with the end of the log when it fails."""
    if load.kind == "latency":
        return _figures(lambda result: _latency(load, result), on)
    with _serving(load, (on,)) as ports:
        return _ask(load, on, ports[on])


def _ask(load: Load, on: bool, port: int) -> Figures:
    figures = _figures(lambda result: _bench(load, port, result), on)
    if figures["completed"] < load.prompts:  # vLLM's benchmark succeeds all the same, with times of zero
        raise Unsupported(
            f"vLLM {_side(on)} answered {figures['completed']} of {load.prompts} requests. "
            f"Run `W4A16_VLLM={on:d} vllm serve {load.model}` and ask it once to see why."
        )
    return figures


def _figures(command: Callable[[Path], list[str]], on: bool) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("w") as out:
            done = subprocess.run(command(result), stdout=out, stderr=out, env=with_plugin(on), check=False)
        if done.returncode:
            raise _failed(on, log)
        figures: Figures = json.loads(result.read_text(encoding="utf-8"))
        return figures


def _latency(load: Load, result: Path) -> list[str]:
    lengths = ["--input-len", str(load.input_len), "--output-len", str(load.output_len)]
    runs = ["--batch-size", str(load.prompts), "--num-iters", "3", "--num-iters-warmup", "1", "--seed", str(load.seed)]
    return [
        *VLLM, "bench", "latency", "--model", load.model, *lengths, *runs, "--output-json", str(result), *load.engine,
    ]  # fmt: skip


def _bench(load: Load, port: int, result: Path) -> list[str]:
    where = ["--backend", "vllm", "--host", "127.0.0.1", "--port", str(port), "--model", load.model]
    what = ["--dataset-name", "random", "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    sizes = ["--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len)]
    count = ["--num-prompts", str(load.prompts), "--num-warmups", "2", "--seed", str(load.seed)]
    into = ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    return [*VLLM, "bench", "serve", *where, *what, *sizes, *count, *into]


@contextmanager
def _serving(load: Load, sides: Sequence[bool]) -> Iterator[dict[bool, int]]:
    """Servers, started together; their ports by side."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with ExitStack() as probes:  # all held until the last is known, so that no port comes twice
            held = {on: probes.enter_context(socket.socket()) for on in sides}
            for probe in held.values():
                probe.bind(("127.0.0.1", 0))
            ports: dict[bool, int] = {on: probe.getsockname()[1] for on, probe in held.items()}
        logs = {on: Path(folder, f"log-{on}") for on in sides}
        servers: dict[bool, subprocess.Popen[bytes]] = {}
        stack.callback(_stop, servers.values())
        for on in sides:
            servers[on] = _started(load, on, ports[on], logs[on])
        for on, server in servers.items():
            _wait(server, ports[on], on, logs[on])
        yield ports


def _started(load: Load, on: bool, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [*VLLM, "serve", load.model, "--host", "127.0.0.1", "--port", str(port), "--seed", str(load.seed)]
    with log.open("w") as out:
        return subprocess.Popen([*command, *load.engine], stdout=out, stderr=out, env=with_plugin(on))


def _stop(servers: Iterable[subprocess.Popen[bytes]]) -> None:
    for server in servers:
        server.send_signal(signal.SIGINT)
    until = time.monotonic() + STOP_S
    for server in servers:
        try:
            server.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, on: bool, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise _failed(on, log)


def _failed(on: bool, log: Path) -> Unsupported:
    tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    nothing = "" if on else ", so there is nothing to compare with"
    return Unsupported(f"vLLM failed {_side(on)}{nothing}. The end of its log:\n{tail}")


def _side(on: bool) -> str:
    return "with w4a16" if on else "without w4a16 (W4A16_VLLM=0)"
