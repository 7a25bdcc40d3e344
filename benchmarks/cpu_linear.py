"""Times one linear layer on the CPU: w4a16 with and without its extra against torch's dense bf16 and fp32.

    python benchmarks/cpu_linear.py --json cpu.json

Every provider is checked against fp32 first. Then each round times a burst of calls of every provider, so that all meet
the same machine; as in a model, a call follows others of its kind, so the first of a burst does not count. Weights
rotate over copies that do not fit the last cache together. Medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from w4a16 import Problem, current_device, layouts, ops
from w4a16.dispatch import launcher
from w4a16.layouts import EXLLAMA, INT4PACK, PackedWeight
from w4a16.tuning.table import tile_for
from w4a16.weight import QuantizedWeight, pack_nibbles

Call = Callable[[Tensor, int], Tensor]
ROUNDS, BURST = 7, 20
BOUND = 4e-3  # relative RMS of a bf16 output


def random_weight(n: int, k: int, group: int) -> QuantizedWeight:
    return QuantizedWeight(
        codes=pack_nibbles(torch.randint(0, 16, (n, k))),
        scales=(torch.rand(n, k // group) * 0.02 + 0.005).bfloat16(),
        zeros=torch.randint(0, 16, (n, k // group), dtype=torch.uint8),
        group=group,
    )


def forced(stem: str, weights: list[PackedWeight]) -> Call:
    def call(x: Tensor, copy: int) -> Tensor:
        weight = weights[copy]
        problem = Problem(m=x.shape[0], n=weight.n, k=weight.k, group=weight.group, has_zeros=True)
        out = x.new_empty((x.shape[0], weight.n))
        tile = tile_for(stem, problem, current_device())
        launcher(stem)(out=out, x=x, weight=weight, bias=None, tile=tile)
        return out

    return call


def ours(weights: list[PackedWeight]) -> Call:
    def call(x: Tensor, copy: int) -> Tensor:
        w = weights[copy]
        y: Tensor = ops.linear_op(x, w.codes, w.scales, w.zeros, None, None, w.layout, w.n, w.k, w.group)
        return y

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 1024])
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    plain = [random_weight(options.n, options.k, options.group) for _ in range(options.copies)]
    dense32 = [weight.dequantize(torch.float32) for weight in plain]
    dense16 = [weight.bfloat16() for weight in dense32]
    exllama = [layouts.pack(weight, layout=EXLLAMA) for weight in plain]
    int4pack = [layouts.pack(weight, layout=INT4PACK) for weight in plain]
    providers: dict[str, Call] = {
        "w4a16[cpu]": ours(exllama),
        "w4a16": ours(int4pack),
        "cpu_decode": forced("cpu_decode", exllama),
        "cpu_prefill": forced("cpu_prefill", exllama),
        "cpu_int4pack": forced("cpu_int4pack", int4pack),
        "dense": forced("dense", int4pack),
        "bf16 mm": lambda x, copy: x @ dense16[copy].t(),
        "fp32 mm": lambda x, copy: x.float() @ dense32[copy].t(),
    }
    print(f"N={options.n} K={options.k} group={options.group} asymmetric bf16, ms, {torch.get_num_threads()} threads,")
    print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    print("     M " + "".join(f"{name:>13}" for name in providers) + "  bf16/[cpu]  fp32/[cpu]  fp32/plain")
    results = []
    for m in options.rows:
        x = torch.randn(m, options.k).bfloat16()
        for name, call in providers.items():
            wanted = x.float() @ dense32[0].t()
            error = float((call(x, 0).float() - wanted).norm() / wanted.norm())
            assert error <= BOUND, f"{name} at M={m}: relative RMS {error}"
        times: dict[str, list[float]] = {name: [] for name in providers}
        burst = BURST if m <= 16 else 1
        for turn in range(ROUNDS):
            for name, call in providers.items():
                for step in range(1 + burst):
                    started = time.perf_counter()
                    call(x, (turn + step) % options.copies)
                    if step:
                        times[name].append((time.perf_counter() - started) * 1e3)
        median = {name: statistics.median(values) for name, values in times.items()}
        ratios = [
            median["bf16 mm"] / median["w4a16[cpu]"],
            median["fp32 mm"] / median["w4a16[cpu]"],
            median["fp32 mm"] / median["w4a16"],
        ]
        print(f"{m:6d} " + "".join(f"{t:13.3f}" for t in median.values()) + "".join(f"{r:12.2f}" for r in ratios))
        results.append({"m": m, "median_ms": median, "min_ms": {name: min(v) for name, v in times.items()}})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
