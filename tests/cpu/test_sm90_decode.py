"""What sm90_decode's plan gives the kernel."""

from __future__ import annotations

import torch
from helpers import random_weight

from w4a16.kernels._launch import Launch
from w4a16.kernels.sm90_decode import plan
from w4a16.layouts import SM90, pack
from w4a16.tuning.sm90_tiles import Sm90DecodeTile


def launch_of(tile: Sm90DecodeTile, k: int, x_stride: int | None = None) -> Launch:
    x = torch.empty_strided((2, k), (x_stride or k, 1), dtype=torch.bfloat16, device="meta")
    weight = pack(random_weight(64, k, group=32, asym=True), layout=SM90)
    (launch,) = plan(out=x.new_empty((2, 64)), x=x, weight=weight, bias=None, tile=tile)
    return launch


def test_one_trip_takes_the_tiles_there_are() -> None:
    """Registers for five tiles, not for eight; trips of several are whole."""
    one, several = (launch_of(Sm90DecodeTile(split_k=split), 2560).constants for split in (8, 2))
    assert (one["DEPTH"], one["TILES"], one["SLABS"]) == (8, 5, 1)
    assert (several["DEPTH"], several["TILES"], several["SLABS"]) == (8, 8, 3)


def test_rows_of_x_that_32_bits_do_not_reach_are_copied() -> None:
    """The last tokens of long prompts lie S * K apart."""
    for stride, copied in ((1 << 27, True), ((1 << 27) - 16, False)):
        x = launch_of(Sm90DecodeTile(split_k=1), 128, stride).args["x_ptr"]
        assert x.stride(0) == (128 if copied else stride)
