"""Measures a machine's peaks: copies, products, launches."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..bench.timer import time_calls
from ..device import Graph, Stopwatch, gpu_name, session_facts, synchronize
from ..problem import ACT_DTYPES
from .peaks import Peaks

ROUNDS = 9
SMALL = 1000  # small kernels in a row
# Much larger than any cache; large enough that the matrix units stay full. fp32 products have 1/10 of the rate.
MEMORY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
MATRIX_SIDE = {"cuda": {"bf16": 8192, "fp16": 8192, "fp32": 4096}, "cpu": {"bf16": 1024, "fp16": 1024, "fp32": 2048}}


def measure(where: torch.device) -> Peaks:
    """Everything about `where`, in some ten seconds: the fastest round of each, since a peak is what can be reached."""
    torch.backends.cuda.matmul.allow_tf32 = False
    launch, round_trip, graph = _launches(where)
    on_gpu = where.type == "cuda"
    facts = session_facts() if on_gpu else f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return Peaks(
        machine=gpu_name() if on_gpu else cpu_name(),
        session=f"{facts}; {time.strftime('%Y-%m-%d')}",
        memory_bytes_per_s=_memory(where),
        matrix_flops={act: _matrix(where, act) for act in ACT_DTYPES},
        launch_us=launch * 1e6,
        round_trip_us=round_trip * 1e6,
        graph_us=None if graph is None else graph * 1e6,
    )


def cpu_name() -> str:
    """This machine's CPU as its kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory(where: torch.device) -> dict[str, float]:
    """Bytes a second of a copy by the driver, of one by a kernel, and of reading alone."""
    source = torch.rand(MEMORY_BYTES[where.type] // 4, device=where)
    target = torch.empty_like(source)
    calls = {
        "copy": (2, lambda: target.copy_(source)),
        "scale": (2, lambda: torch.mul(source, 3, out=target)),
        "read": (1, lambda: source.sum()),
    }
    return {name: times * source.nbytes / _fastest(call, where) for name, (times, call) in calls.items()}


def _matrix(where: torch.device, act: str) -> float:
    """With weights of 16 values, as dequantised ones have a group: at full rate a GPU's clock follows the power drawn,
    and so the bits that change."""
    side = MATRIX_SIDE[where.type][act]
    x = torch.randn(side, side, device=where).to(ACT_DTYPES[act])
    weight = torch.randint(-8, 8, (side, side), device=where).to(ACT_DTYPES[act])
    out = torch.empty_like(x)
    return 2 * side**3 / _fastest(lambda: torch.mm(x, weight.t(), out=out), where)


def _fastest(call: Callable[[], object], where: torch.device) -> float:
    return min(time_calls({"it": lambda _: call()}, {"it": 2}, where, ROUNDS)["it"])


def _launches(where: torch.device) -> tuple[float, float, float | None]:
    """Seconds of a small kernel in a row of many, of one that is waited for, and of one in a graph."""
    x = torch.zeros(1, device=where)

    def row() -> None:
        for _ in range(SMALL):
            x.add_(1)

    def waited() -> None:
        x.add_(1)
        wait()

    def rowed() -> float:
        wait()
        return _clock(row) / SMALL

    def wait() -> None:
        if where.type == "cuda":
            synchronize()

    row()
    waited()
    rows, trips = [rowed() for _ in range(ROUNDS)], [_clock(waited) for _ in range(SMALL)]
    if where.type != "cuda":
        return min(rows), statistics.median(trips), None
    graph, watch, replays = Graph(row), Stopwatch(), []
    for _ in range(ROUNDS):
        watch.start()
        graph.replay()
        replays.append(watch.stop() / SMALL)
    return min(rows), statistics.median(trips), min(replays)


def _clock(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
