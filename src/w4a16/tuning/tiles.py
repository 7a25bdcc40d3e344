"""Tile types, one per kernel family: the numbers a tuning row gives a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CpuTile:
    """block_n: rows of W handled at a time, so that what they dequantise to stays in cache."""

    block_n: int


TILES = dict.fromkeys(("cpu_decode", "cpu_prefill", "dense"), CpuTile)
