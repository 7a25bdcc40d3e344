"""w4a16's expert layer on an H100 beside the fastest of its peers, through torch._grouped_mm on dense bf16 weights,
which both were timed beside.

r = (grouped_mm time / w4a16 time) here / (grouped_mm time / best peer's time) in PEERS; r > 1 beats them. On an H100:

    python benchmarks/hopper_moe.py [--routing zipf2] [--act fp16] [--zeros asym] [--group 32] [--tokens 1,64,4096]
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from dataclasses import replace

import torch
from torch import Tensor

from w4a16 import PackedWeight, QuantizedWeight, moe, pack_experts, record
from w4a16.bench.expert_cases import EXPERTS, ROUTINGS, TOKENS, ExpertShape, random_experts, routed
from w4a16.bench.expert_peers import grouped_mm
from w4a16.bench.expert_run import CHECKED, ROTATED, expected
from w4a16.bench.timer import time_calls
from w4a16.device import this_machine
from w4a16.problem import ACT_DTYPES

# Microseconds of grouped_mm and of the fastest of Humming 0.1.19 and Marlin MoE (vLLM 0.25.1; it wins at one token),
# for TOKENS: the first layer of LAYERS, bf16, symmetric, G=128, uniform routing, the whole layer given the routing ids.
GROUPED_MM = (91.4, 170.0, 358.9, 539.6, 569.8, 710.3, 1125)
PEERS = (29.8, 45.7, 92.2, 129.6, 151.7, 243.9, 732.6)
LAYERS = (
    replace(EXPERTS["qwen3-30b-a3b"], name="Qwen3-30B-A3B"),
    replace(EXPERTS["qwen3.5-35b-a3b"], name="E=256 I=512"),
)


def checked(
    x: Tensor,
    plain: tuple[QuantizedWeight, QuantizedWeight],
    packed: tuple[PackedWeight, PackedWeight],
    share: Tensor,
    ids: Tensor,
) -> None:
    """Raises SystemExit where w4a16's layer is wrong for some tokens, by the experts that these have."""
    rows = torch.randperm(len(x))[:CHECKED].to(x.device)
    got, wanted = moe(x, *packed, share, ids)[rows].float(), expected(x, plain, share, ids, rows)
    error = float((got - wanted).norm() / wanted.norm())
    if not error < (4e-3 if x.dtype == torch.bfloat16 else 1e-3):
        raise SystemExit(f"{len(x)} tokens: got a relative error of {error:.2e}, wanted less. Nothing was timed.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--act", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--zeros", choices=("sym", "asym"), default="sym")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if this_machine().arch != "sm90":
        parser.error(f"got a machine of {this_machine().arch}, wanted a Hopper GPU, which PEERS were timed on.")
    torch.manual_seed(given.seed)
    print(f"{given.routing} routing, {given.act}, {given.zeros}metric, G={given.group}; us a layer")
    for layer in LAYERS:
        measure(layer, [int(tokens) for tokens in given.tokens.split(",")], given)


def measure(layer: ExpertShape, row_counts: list[int], given: argparse.Namespace) -> None:
    act, grouped = ACT_DTYPES[given.act], replace(layer, group=given.group)
    plain = random_experts(grouped, act=given.act, has_zeros=given.zeros == "asym", device=torch.device("cuda"))
    packed = pack_experts(*plain, device="cuda", act=act)
    weight_bytes = sum(weight.nbytes for weight in packed)
    dense = plain[0].dequantize(act), plain[1].dequantize(act)
    generator = torch.Generator().manual_seed(given.seed)
    titles = f"{'tokens':>8}{'grouped_mm':>12}{'w4a16':>9}{'times':>7}{'r':>7}{'GB/s':>7}{'TFLOP/s':>9}  kernel"
    print(f"{layer.name}\n{titles}")
    ratios = []
    for tokens in row_counts:
        first = routed(given.routing, tokens, layer, generator)
        x = torch.randn(tokens, layer.hidden, device="cuda", dtype=act)
        share = torch.rand(tokens, layer.top_k, device="cuda")
        ids = [((first + i * layer.experts // ROTATED) % layer.experts).cuda() for i in range(ROTATED)]
        with record() as served:
            checked(x, plain, packed, share, ids[0])
        calls = {
            "grouped_mm": functools.partial(dense_turn, x, dense, share, ids),
            "w4a16": functools.partial(packed_turn, x, packed, share, ids),
        }
        seconds = time_calls(calls, dict.fromkeys(calls, ROTATED), torch.device("cuda"), given.rounds)
        theirs, ours = (statistics.median(seconds[name]) * 1e6 for name in calls)
        r = ""
        if layer is LAYERS[0] and tokens in TOKENS:
            at = TOKENS.index(tokens)
            ratios.append(theirs / ours / (GROUPED_MM[at] / PEERS[at]))
            r = f"{ratios[-1]:.2f}"
        gb_s = weight_bytes * len(first.unique()) / layer.experts / ours * 1e-3
        tflop_s = 6 * first.numel() * layer.hidden * layer.inter / ours * 1e-6
        line = f"{tokens:>8}{theirs:12.1f}{ours:9.1f}{theirs / ours:7.2f}{r:>7}{gb_s:7.0f}{tflop_s:9.1f}"
        print(f"{line}  {served[0][0]}", flush=True)
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"geometric mean of r {mean:.3f}, least {min(ratios):.3f}")


def dense_turn(x: Tensor, dense: tuple[Tensor, Tensor], share: Tensor, ids: list[Tensor], turn: int) -> Tensor:
    return grouped_mm(x, *dense, share, ids[turn])


def packed_turn(
    x: Tensor, packed: tuple[PackedWeight, PackedWeight], share: Tensor, ids: list[Tensor], turn: int
) -> Tensor:
    return moe(x, *packed, share, ids[turn])


if __name__ == "__main__":
    main()
