"""Times calls side by side: interleaved, medians, no weight in the last cache.

A call takes the number of the weight copy it is to use. On a GPU a CUDA graph holds one call for each copy, so that
neither Python nor launch gaps count; on a CPU a burst of calls follows one that does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from ..device import Graph, Stopwatch, synchronize

Call = Callable[[int], object]
ROTATE_BYTES = 256 << 20  # of weights in turn: several times any last cache here
GRAPH_S = 2e-3
LONGEST_BURST_S = 20e-3


def copies_for(weight_bytes: int, most: int = 64) -> int:
    """How many copies of a weight leave none of it in the last cache when its turn comes again."""
    return max(2, min(most, -(-ROTATE_BYTES // weight_bytes)))


def time_calls(
    calls: Mapping[str, Call], copies: Mapping[str, int], where: torch.device, rounds: int = 15
) -> dict[str, list[float]]:
    """Seconds a call of each provider, one number a round; every round times every provider once."""
    bursts = {name: _burst(call, copies[name], where) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, burst in bursts.items():
            seconds[name].append(burst())
    return seconds


def spread_percent(seconds: list[float]) -> float:
    """Half the distance between the quartiles, in per cent of the median."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return 50 * (high - low) / middle


def _burst(call: Call, copies: int, where: torch.device) -> Callable[[], float]:
    """A function that runs a burst of calls and returns the seconds of one."""
    return _burst_on_cpu(call, copies) if where.type == "cpu" else _burst_on_gpu(call, copies)


def _burst_on_cpu(call: Call, copies: int) -> Callable[[], float]:
    started = time.perf_counter()
    call(0)
    length = max(1, min(10, int(LONGEST_BURST_S / (time.perf_counter() - started))))
    turn = 0

    def burst() -> float:
        nonlocal turn
        taken = []
        for step in range(1 + length):
            begun = time.perf_counter()
            call(turn % copies)
            turn += 1
            if step:
                taken.append(time.perf_counter() - begun)
        return statistics.median(taken)

    return burst


def _burst_on_gpu(call: Call, copies: int) -> Callable[[], float]:
    call(0)
    synchronize()
    watch = Stopwatch()
    watch.start()
    call(1 % copies)
    once = watch.stop()
    # Long enough that the graph's own launch does not count, no longer than a round may take.
    length = max(2, min(max(copies, int(GRAPH_S / once)), int(LONGEST_BURST_S / once)))
    graph = Graph(lambda: [call(step % copies) for step in range(length)], ran=True)

    def burst() -> float:
        watch.start()
        graph.replay()
        return watch.stop() / length

    burst()
    return burst
