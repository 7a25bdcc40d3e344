"""Every Hopper kernel once, on small problems with tails, to be run under each tool of NVIDIA's checker:

    for tool in memcheck racecheck synccheck; do
        compute-sanitizer --tool $tool python tests/device/sanitize.py [part/parts]
    done

With part/parts, such as 0/8, every so many cases, for processes side by side. Results are compared with the fp32
reference all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
from helpers import assert_close, random_weight

from w4a16.dispatch import launcher
from w4a16.layouts import SM90, pack
from w4a16.reference import reference_linear
from w4a16.tuning.sm90_tiles import Sm90DecodeTile, Sm90PrefillTile
from w4a16.tuning.table import rows_of

Case = tuple[Sm90DecodeTile | Sm90PrefillTile, int, int, int, int, bool]  # tile, M, N, K, G, zero points


def linear_cases() -> Iterator[Case]:
    for row in rows_of("sm90"):
        tile, asym = row.tile, row.conditions.get("has_zeros", False)
        group = row.conditions.get("group_max", 128)
        if row.stem == "sm90_decode":
            yield replace(tile, split_k=1), row.conditions.get("m_max", 16) - 1, 136, 1152, group, asym
            yield replace(tile, split_k=4), row.conditions.get("m_max", 16), 72, 2048, group, asym
        if row.stem == "sm90_prefill":
            yield replace(tile, split_k=1), tile.block_m + 3, 200, 512, 128, False
            yield replace(tile, split_k=2), tile.block_m - 3, 72, 1024, 32, True


def main() -> None:
    part, parts = map(int, (sys.argv[1] if len(sys.argv) > 1 else "0/1").split("/"))
    cases = list(linear_cases())[part::parts]
    for tile, m, n, k, group, asym in cases:
        weight = random_weight(n, k, group=group, asym=asym)
        x = torch.randn(m, k, dtype=torch.bfloat16)
        out = torch.full((m, n), float("nan"), dtype=x.dtype, device="cuda")
        stem = "sm90_decode" if isinstance(tile, Sm90DecodeTile) else "sm90_prefill"
        launcher(stem)(out=out, x=x.cuda(), weight=pack(weight, layout=SM90).to("cuda"), bias=None, tile=tile)
        assert_close(out.cpu(), reference_linear(x, weight))
    print(f"{len(cases)} launches agree with the reference")


if __name__ == "__main__":
    main()
