"""The hot loop of the source's prefill kernel against w4a16's, tile by tile, compiled for a GPU that need not be here.

    python benchmarks/isa_prefill.py gfx1151

The source's kernel is in rocm_prefill.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import triton
from rich.console import Console
from rich.table import Table
from rocm_prefill import source_launch

from w4a16.codegen.classes import VECTOR, classify
from w4a16.codegen.compile import compile_launch
from w4a16.codegen.isa import Isa, read_isa
from w4a16.codegen.stems import compile_stem
from w4a16.device import Device, known_device
from w4a16.problem import Problem
from w4a16.tuning.table import device_rows
from w4a16.tuning.tiles import DEQUANTS, PrefillTile, why_illegal

PROBLEM = Problem(m=2048, n=4096, k=4096, group=128, act="bf16", has_zeros=True)
TILE = PrefillTile(block_m=64, block_n=256, block_k=64, warps=8)  # the source's large tile
CHOSEN = {"bf16": "int_subtract", "fp16": "float_subtract"}  # the source's own form of dequantisation


def source(act: str, tile: PrefillTile, device: Device) -> Isa:
    return read_isa(compile_launch(source_launch(replace(PROBLEM, act=act), replace(tile, unroll_k=1)), device))


def ours(act: str, tile: PrefillTile, device: Device) -> Isa:
    return read_isa(compile_stem("triton_prefill", replace(PROBLEM, act=act), device, tile)[-1])


def subtraction_table(device: Device) -> Table:
    """The vector instructions that the source's two ways to subtract the zero point compile to."""
    columns = [
        (f"{act}\n{form}", source(act, replace(TILE, dequant=form), device))
        for act in CHOSEN
        for form in ("float_subtract", "int_subtract")
    ]
    table = Table("VALU instruction", title=heading("the source's kernel, tile 64x256x64, 8 warps", device))
    for name, _ in columns:
        table.add_column(name, justify="right")
    total = sum((reading.opcodes for _, reading in columns), Counter[str]())
    for opcode, count in total.most_common():
        if classify(opcode, device.arch) == VECTOR and count >= 32:
            table.add_row(opcode, *(str(reading.opcodes[opcode] or "") for _, reading in columns))
    table.add_row("all, with the rarer", *(str(reading.counts[VECTOR]) for _, reading in columns))
    return table


def form_tiles(act: str, device: Device) -> list[PrefillTile]:
    """TILE with every form that serves `act`, pinned too where that applies."""
    every = [replace(TILE, dequant=form, pinned=pinned) for form in DEQUANTS for pinned in (False, True)]
    problem = replace(PROBLEM, act=act)
    fits = [tile for tile in every if why_illegal("triton_prefill", tile, problem, device) is None]
    return [tile for tile in fits if not tile.pinned or tile.dequant.startswith(("magic", "group"))]


def production_tiles(act: str, device: Device) -> list[PrefillTile]:
    """Every tile that the tuning tables give `act` on this device."""
    rows = [row for row in device_rows("triton_prefill", device) if row.use and row.conditions.get("act", act) == act]
    return list(dict.fromkeys(row.tile for row in rows if row.table != "any"))


def comparison(title: str, act: str, tiles: list[PrefillTile], device: Device) -> Table:
    """Each tile by w4a16's kernel, against the source's kernel at the same tile in the form the source chose."""
    table = Table("tile", "w4a16's dequant", title=heading(f"{title}, {act}", device))
    names = ["VALU a weight\nsource", "\nw4a16", "\nratio", "matrix share\nsource", "\nw4a16", "\nratio"]
    for name in (*names, "VGPRs", "spills"):
        table.add_column(name, justify="right")
    for tile in tiles:
        base, found = source(act, replace(tile, dequant=CHOSEN[act]), device), ours(act, tile, device)
        table.add_row(
            f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.warps}w",
            tile.dequant + (" pinned" if tile.pinned else ""),
            f"{base.vector_per_weight:.2f}",
            f"{found.vector_per_weight:.2f}",
            f"{found.vector_per_weight / base.vector_per_weight:.2f}",
            f"{100 * base.matrix_share:.1f} %",
            f"{100 * found.matrix_share:.1f} %",
            f"{found.matrix_share / base.matrix_share:.2f}",
            str(found.registers),
            str(found.spills),
        )
    return table


def heading(what: str, device: Device) -> str:
    return f"{what}; asymmetric, G={PROBLEM.group}, {device.arch}, Triton {triton.__version__}"


def main(arch: str) -> None:
    device, console = known_device(arch), Console(width=120)
    console.print(subtraction_table(device))
    for act in CHOSEN:
        console.print(comparison("every form at one tile", act, form_tiles(act, device), device))
    for act in CHOSEN:
        console.print(comparison("the tiles of the tuning tables", act, production_tiles(act, device), device))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["gfx1151"]))
