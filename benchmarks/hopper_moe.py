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
from dataclasses import dataclass

import torch
from torch import Tensor

from w4a16 import PackedWeight, QuantizedWeight, moe, pack_experts, record
from w4a16.bench.timer import time_calls
from w4a16.device import this_machine
from w4a16.problem import ACT_DTYPES
from w4a16.reference import reference_moe

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
# Microseconds of grouped_mm and of the fastest of Humming 0.1.19 and Marlin MoE (vLLM 0.25.1; it wins at one token),
# for TOKENS: the first layer of LAYERS, bf16, symmetric, G=128, uniform routing, the whole layer given the routing ids.
GROUPED_MM = (91.4, 170.0, 358.9, 539.6, 569.8, 710.3, 1125)
PEERS = (29.8, 45.7, 92.2, 129.6, 151.7, 243.9, 732.6)
ROUTINGS = ("balanced", "uniform", "zipf1", "zipf2", "hot16")
ROTATED = 16  # routings in turn, each over other experts, so that few tokens find no weight in the L2 cache
CHECKED = 16  # tokens, compared with the reference


@dataclass(frozen=True, kw_only=True)
class Layer:
    name: str
    experts: int
    top_k: int
    hidden: int
    inter: int


LAYERS = (
    Layer(name="Qwen3-30B-A3B", experts=128, top_k=8, hidden=2048, inter=768),
    Layer(name="E=256 I=512", experts=256, top_k=8, hidden=2048, inter=512),
)


def routed(routing: str, tokens: int, layer: Layer, generator: torch.Generator) -> Tensor:
    """Experts of each token, distinct; by Gumbel top-k of an archetype's weights."""
    if routing == "balanced":
        return (torch.arange(tokens * layer.top_k) % layer.experts).view(tokens, layer.top_k)
    rank = torch.arange(1, layer.experts + 1).float()
    hot = torch.where(rank <= 16, 1.0, 0.01)
    weight = {"uniform": rank**0, "zipf1": 1 / rank, "zipf2": rank**-2, "hot16": hot}[routing]
    gumbel = -torch.empty(tokens, layer.experts).exponential_(generator=generator).log()
    return (weight.log() + gumbel).topk(layer.top_k).indices


def random_experts(layer: Layer, n: int, k: int, group: int, asym: bool, act: torch.dtype) -> QuantizedWeight:
    grid = (layer.experts, n, k // group)
    return QuantizedWeight(
        codes=torch.randint(-(1 << 31), 1 << 31, (layer.experts, n, k // 8), dtype=torch.int32, device="cuda"),
        scales=(torch.rand(grid, device="cuda") * 0.02 + 0.005).to(act),
        zeros=torch.randint(0, 16, grid, dtype=torch.uint8, device="cuda") if asym else None,
        group=group,
    )


def grouped_mm(x: Tensor, w13: Tensor, w2: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """The same layer over dense weights [E, 2I, H] and [E, H, I]: sort, two grouped GEMMs, weighted sum."""
    tokens, top_k = ids.shape
    key, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(key, torch.arange(len(w13), device="cuda"), right=True).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    slots = torch.empty_like(y).index_copy_(0, order, y)
    return (slots.view(tokens, top_k, -1).float() * share.unsqueeze(-1)).sum(1).to(x.dtype)


def checked(
    x: Tensor,
    plain: tuple[QuantizedWeight, QuantizedWeight],
    packed: tuple[PackedWeight, PackedWeight],
    share: Tensor,
    ids: Tensor,
) -> None:
    """Raises SystemExit where w4a16's layer is wrong for some tokens, by the experts that these have."""
    rows = torch.randperm(len(x))[:CHECKED].to(x.device)
    got = moe(x, *packed, share, ids)[rows].float()
    used, local = ids[rows].unique(return_inverse=True)
    wanted = reference_moe(x[rows], of(plain[0], used), of(plain[1], used), share[rows], local)
    error = float((got - wanted).norm() / wanted.norm())
    if not error < (4e-3 if x.dtype == torch.bfloat16 else 1e-3):
        raise SystemExit(f"{len(x)} tokens: got a relative error of {error:.2e}, wanted less. Nothing was timed.")


def of(weight: QuantizedWeight, experts: Tensor) -> QuantizedWeight:
    """Some experts of a weight."""
    zeros = None if weight.zeros is None else weight.zeros[experts]
    return QuantizedWeight(codes=weight.codes[experts], scales=weight.scales[experts], zeros=zeros, group=weight.group)


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


def measure(layer: Layer, row_counts: list[int], given: argparse.Namespace) -> None:
    act, asym = ACT_DTYPES[given.act], given.zeros == "asym"
    plain = (
        random_experts(layer, 2 * layer.inter, layer.hidden, given.group, asym, act),
        random_experts(layer, layer.hidden, layer.inter, given.group, asym, act),
    )
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
