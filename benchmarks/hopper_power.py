"""What an expert layer on a Hopper GPU runs at for seconds on end: microseconds, SM clock and watts.

Of random x, and of zeros, whose products cost little power: where zeros are faster, the power limit binds, not the
kernels. torch's dense product stands beside. On an H100:

    python benchmarks/hopper_power.py [--seconds 2]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from w4a16 import moe, pack_experts
from w4a16.bench.expert_cases import EXPERTS, random_experts, routed
from w4a16.device import Graph, synchronize, this_machine

LAYER = EXPERTS["qwen3-30b-a3b"]
CASES = (("balanced", 1024), ("zipf2", 1024), ("uniform", 4096))
DENSE = 8192  # rows and columns
AT_ONCE = 20  # calls in a CUDA graph
ASK = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits")


def sampled(stop: threading.Event, samples: list[tuple[float, float]]) -> None:
    """Adds (MHz, W) to samples until told to stop."""
    while not stop.is_set():
        clock, power = subprocess.run(ASK, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(",")
        samples.append((float(clock), float(power)))


def measure(name: str, call: Callable[[], Tensor], seconds: float) -> None:
    call()

    def calls_at_once() -> None:
        for _ in range(AT_ONCE):
            call()

    graph = Graph(calls_at_once, ran=True)
    stop, samples, calls = threading.Event(), list[tuple[float, float]](), 0
    sampler = threading.Thread(target=sampled, args=(stop, samples))
    sampler.start()
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        for _ in range(10):
            graph.replay()
        synchronize()
        calls += 10 * AT_ONCE
    taken = time.perf_counter() - start
    stop.set()
    sampler.join()
    late = samples[len(samples) // 2 : -1] or samples  # the clock has settled, and work still runs
    clock, power = (statistics.fmean(values) for values in zip(*late, strict=True))
    print(f"{name:<28}{taken / calls * 1e6:9.1f} us{clock:7.0f} MHz{power:6.0f} W", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    given = parser.parse_args()
    if this_machine().arch != "sm90":
        parser.error(f"got a machine of {this_machine().arch}, wanted a Hopper GPU.")
    torch.manual_seed(0)
    plain = random_experts(LAYER, act="bf16", has_zeros=False, device=torch.device("cuda"))
    packed = pack_experts(*plain, device="cuda", act=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for routing, tokens in CASES:
        ids = routed(routing, tokens, LAYER, generator).cuda()
        share = torch.rand(ids.shape, device="cuda")
        x = torch.randn(tokens, LAYER.hidden, device="cuda").bfloat16()
        for kind, rows in (("random", x), ("zeros", torch.zeros_like(x))):
            call = functools.partial(moe, rows, *packed, share, ids)
            measure(f"{routing} {tokens}, {kind}", call, given.seconds)
    a, b = (torch.randn(DENSE, DENSE, device="cuda").bfloat16() for _ in range(2))
    measure(f"dense {DENSE}, random", functools.partial(torch.mm, a, b), given.seconds)
    measure(f"dense {DENSE}, zeros", functools.partial(torch.mm, torch.zeros_like(a), b), given.seconds)


if __name__ == "__main__":
    main()
