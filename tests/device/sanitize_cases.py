"""Every GPU kernel of Hopper once, on small problems with tails: what sanitize.py runs under NVIDIA's checker.

    python tests/device/sanitize_cases.py 0/14 [FOLDER [STEMS]]

runs every 14th case, of some kernels, and compares it with the fp32 reference; FOLDER receives the machine code of the
kernels that have partitions, by which sanitize.py judges racecheck's reports.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
from helpers import assert_close, fitting, random_weight
from racecheck_controls import partitions, words

from w4a16.device import current_device
from w4a16.dispatch import launcher
from w4a16.kernels._launch import Launch
from w4a16.kernels.sm90_moe import _sm90_moe
from w4a16.kernels.sm90_prefill import _sm90_prefill
from w4a16.layouts import SKINNY, SM90, pack
from w4a16.problem import Problem
from w4a16.reference import reference_linear, reference_moe
from w4a16.tuning.sm90_moe_tiles import WIDE, Sm90MoeTile
from w4a16.tuning.sm90_tiles import Sm90DecodeTile
from w4a16.tuning.table import rows_of, tile_for
from w4a16.tuning.tiles import why_illegal

Case = partial[None]
NARROW = Sm90DecodeTile(warps=4, depth=4, split_k=2, slabs=3)


def linear(stem: str, layout: str, tile: object, m: int, n: int, k: int, group: int, asym: bool) -> None:
    """One product by one kernel; no tile: that of the device's own row."""
    weight = random_weight(n, k, group=group, asym=asym)
    x = torch.randn(m, k, dtype=torch.bfloat16)
    out = torch.full((m, n), float("nan"), dtype=x.dtype, device="cuda")
    problem = Problem(m=m, n=n, k=k, group=group, act="bf16", has_zeros=asym)
    tile = tile or tile_for(stem, problem, current_device("cuda"))
    launcher(stem)(out=out, x=x.cuda(), weight=pack(weight.to("cuda"), layout=layout), bias=None, tile=tile)
    assert_close(out.cpu(), reference_linear(x, weight))


def experts(stem: str, layout: str, tile: object, tokens: int, top_k: int, group: int, asym: bool) -> None:
    """One expert layer; 301 tokens that go to 8 experts each are more slots than the route takes in one launch."""
    count, hidden, inter = (128, 256, 128) if top_k == 8 else (16, 320, 192)
    w13 = random_weight(2 * inter, hidden, group=group, asym=asym, experts=count)
    w2 = random_weight(hidden, inter, group=group, asym=asym, experts=count)
    x, share = torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, top_k)
    ids = torch.rand(tokens, count).topk(top_k).indices
    ids[torch.rand(ids.shape) < 0.1] = -1
    out = torch.full((tokens, hidden), float("nan"), dtype=x.dtype, device="cuda")
    problem = Problem(
        m=tokens, n=2 * inter, k=hidden, group=group, act="bf16", has_zeros=asym, experts=count, top_k=top_k
    )
    tile = fitting(tile, problem) if isinstance(tile, Sm90MoeTile) else tile_for(stem, problem, current_device("cuda"))
    packed = [pack(weight.to("cuda"), layout=layout) for weight in (w13, w2)]
    given = {"w13": packed[0], "w2": packed[1], "topk_weights": share.cuda(), "topk_ids": ids.cuda()}
    how = {"activation": "silu", "gated": True, "weight_input": False}
    launcher(stem)(out=out, x=x.cuda(), **given, **how, linear=None, tile=tile)
    assert_close(out.cpu(), reference_moe(x, w13, w2, share, ids, **how))


def _lanes_of(kernel: Any, lanes: int, **args: int) -> torch.Tensor:
    out = torch.full((lanes,), -1, dtype=torch.int32, device="cuda")
    Launch(fn=kernel, grid=(64,), args={"out_ptr": out, **args}, constants={}, options={"num_warps": 4}).run()
    return out.cpu()


def control_partitions() -> None:
    assert torch.equal(_lanes_of(partitions, 384), torch.arange(384, dtype=torch.int32))


def control_words() -> None:
    lanes = torch.arange(256, dtype=torch.int32) % 128
    assert torch.equal(_lanes_of(words, 256, turns=5), lanes + sum(range(6)))


def cases() -> Iterator[Case]:
    yield partial(control_partitions)
    yield partial(control_words)
    for row in rows_of("sm90"):
        tile, asym = row.tile, row.conditions.get("has_zeros", False)
        group = row.conditions.get("group_max", 128)
        if row.stem == "sm90_decode":
            one = partial(linear, "sm90_decode", SM90)
            yield partial(one, replace(tile, split_k=1), row.conditions.get("m_max", 16) - 1, 136, 1152, group, asym)
            yield partial(one, replace(tile, split_k=4), row.conditions.get("m_max", 16), 72, 2048, 32, True)
        if row.stem == "sm90_prefill":
            one = partial(linear, "sm90_prefill", SM90)
            yield partial(one, replace(tile, split_k=1), tile.block_m + 3, 200, 512, 128, False)
            yield partial(one, replace(tile, split_k=2), tile.block_m - 3, 72, 1024, 32, True)
            pair = replace(tile, split_k=2, paired=True)
            if why_illegal("sm90_prefill", pair, Problem(m=64, n=64, k=64, group=64), current_device("cuda")) is None:
                yield partial(one, pair, tile.block_m + 3, 200, 1024, 64, True)
        if row.stem == "sm90_moe":
            yield partial(experts, "sm90_moe", SM90, tile, max(2, 2 * tile.block_m), 4, 64, False)
            yield partial(experts, "sm90_moe", SM90, tile, 301, 8, 32, True)
            if tile.block_m in WIDE:
                yield partial(experts, "sm90_moe", SM90, tile, 301, 8, 128, asym)
    for block, top_k in itertools.product((1, 8, 16), (2, 10)):
        tile = Sm90MoeTile(block_m=block, gemm1=NARROW, gemm2=NARROW)
        yield partial(experts, "sm90_moe", SM90, tile, 3 * block, top_k, 64, block == 8)
    for m in (3, 16):
        yield partial(linear, "triton_decode", SKINNY, None, m, 136, 1152, 128, m == 3)
    for m in (40, 300):
        yield partial(linear, "triton_prefill", SKINNY, None, m, 200, 512, 128, m == 40)
    for tokens in (2, 60):
        yield partial(experts, "triton_moe", SKINNY, None, tokens, 4, 64, tokens == 2)


def save_code(folder: Path) -> None:
    """The machine code that this process ran of every kernel with partitions, as <kernel>.<number>.cubin."""
    for fn in (partitions, words, _sm90_prefill, _sm90_moe):
        kernels = fn.device_caches[torch.cuda.current_device()][0].values()
        for number, kernel in enumerate(kernels):
            (folder / f"{fn.__name__}.{number}.cubin").write_bytes(kernel.asm["cubin"])


def main(part: str = "0/1", folder: str = "", stems: str = "") -> None:
    torch.set_num_threads(1)  # processes side by side, each with threads for all cores, take minutes for seconds
    first, step = map(int, part.split("/"))
    asked = [case for case in cases() if not stems or (case.args or ("control",))[0] in stems.split(",")]
    for case in asked[first::step]:
        case()
    torch.cuda.synchronize()
    if folder:
        save_code(Path(folder))
    print(f"{len(asked[first::step])} launches agree with the reference")


if __name__ == "__main__":
    main(*sys.argv[1:])
