"""w4a16 on an H100 beside the fastest of its peers, through cuBLAS, which both were timed beside.

r = (cuBLAS time / w4a16 time) here / (cuBLAS time / best peer's time) in PEERS; r > 1 beats them all. On an H100:

    python benchmarks/hopper.py [--act fp16] [--zeros asym] [--group 32]
"""

from __future__ import annotations

import argparse
import math

from w4a16.bench.cases import shapes_of
from w4a16.bench.providers import providers_of
from w4a16.bench.run import Refusal, run
from w4a16.device import this_machine

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
# Microseconds of cuBLAS on dense bf16 weights and of the fastest of Marlin and Machete (vLLM 0.25.1), Humming 0.1.19,
# FBGEMM's preshuffled bf16xi4, GemLite 0.6.0 and tinygemm, each checked against fp32, for ROWS: bf16, symmetric, G=128,
# weights rotated through the L2 cache, CUDA graphs, medians, one H100 80GB HBM3.
PEERS = {
    "24576x4096": (
        (71.7, 72.4, 72.7, 73.2, 73.8, 74.8, 77.1, 83.3, 134.0, 258.6, 1045),
        (23.6, 23.7, 23.9, 25.0, 28.4, 35.0, 43.9, 73.4, 129.1, 254.4, 1085),
    ),
    "4096x12288": (
        (38.4, 38.4, 38.7, 39.2, 40.0, 41.0, 39.7, 48.1, 67.0, 125.7, 533),
        (15.0, 15.1, 15.6, 16.8, 19.4, 20.7, 26.8, 42.9, 69.4, 123.7, 515),
    ),
    "4096x4096": (
        (15.5, 15.5, 15.7, 16.0, 14.8, 15.1, 15.4, 17.8, 24.1, 44.0, 174.1),
        (6.7, 8.7, 9.2, 9.4, 10.9, 12.4, 15.9, 19.2, 24.6, 44.4, 175.9),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--act", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--zeros", choices=("sym", "asym"), default="sym")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if this_machine().arch != "sm90":
        parser.error(f"got a machine of {this_machine().arch}, wanted a Hopper GPU, which PEERS were timed on.")
    ratios = []
    for name, (blas, best) in PEERS.items():
        shapes = tuple(type(s)(name=s.name, n=s.n, k=s.k, group=given.group) for s in shapes_of(name))
        asym = given.zeros == "asym"
        results = run(
            shapes,
            ROWS,
            providers_of("cublas,w4a16"),
            act=given.act,
            has_zeros=asym,
            device="cuda",
            rounds=given.rounds,
        )
        us: dict[tuple[str, int], float] = {}
        for result in results:
            if isinstance(result, Refusal):
                raise SystemExit(f"{name} M={result.problem.m} {result.provider}: {result.sentence}")
            us[result.provider, result.problem.m] = result.seconds * 1e6
        print(f"{name:>10}  " + "".join(f"{f'M={m}':>9}" for m in ROWS))
        for provider in ("cublas", "w4a16"):
            print(f"{provider:>10}  " + "".join(f"{us[provider, m]:9.1f}" for m in ROWS))
        here = [us["cublas", m] / us["w4a16", m] / (b / p) for m, b, p in zip(ROWS, blas, best, strict=True)]
        print(f"{'r':>10}  " + "".join(f"{r:9.2f}" for r in here))
        ratios += here
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean of r {mean:.3f}, least {min(ratios):.3f}")


if __name__ == "__main__":
    main()
