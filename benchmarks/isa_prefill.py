"""The hot loop of the source's prefill kernel against w4a16's, tile by tile, compiled for a GPU that need not be here.

    python benchmarks/isa_prefill.py gfx1151

The source is the Triton kernel of the gfx11 branch of ROCm's vLLM (its #953 and before), written anew from its
description: masked loads, three interleaves, a shift, the zero point in the activation dtype, one scale a tile.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table

from w4a16.codegen.classes import VECTOR, classify
from w4a16.codegen.compile import compile_launch
from w4a16.codegen.isa import Isa, read_isa
from w4a16.codegen.stems import compile_stem
from w4a16.device import Device, known_device
from w4a16.kernels._launch import Launch
from w4a16.problem import ACT_DTYPES, Problem
from w4a16.tuning.table import device_rows
from w4a16.tuning.tiles import DEQUANTS, PrefillTile, why_illegal

M, N, K, GROUP = 2048, 4096, 4096, 128
TILE = PrefillTile(block_m=64, block_n=256, block_k=64, warps=8)  # the source's large tile
CHOSEN = {"bf16": "int_subtract", "fp16": "float_subtract"}  # the source's own form of dequantisation


@triton.jit
def _source(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    codes_ptr,  # [N, K//8] int32, nibble order 0 2 4 6 1 3 5 7
    scales_ptr,  # [N, K//G]
    zeros_ptr,  # [N, K//G] in the activation dtype
    M,
    N,
    K,
    K8,
    groups,
    GROUP: tl.constexpr,
    INT_SUBTRACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    shift = column % 8 // 2 * 4 + column % 2 * 16
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K + column
        word = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        codes = tl.load(
            codes_ptr + n[:, None] * K8 + word[None, :], mask=(n[:, None] < N) & (word[None, :] < K8), other=0
        )
        codes = tl.interleave(codes, codes)
        codes = tl.interleave(codes, codes)
        codes = tl.interleave(codes, codes)
        codes = (codes >> shift[None, :]) & 0xF
        group = step * BLOCK_K // GROUP
        scale = tl.load(scales_ptr + n * groups + group, mask=n < N, other=0.0)
        zero = tl.load(zeros_ptr + n * groups + group, mask=n < N, other=0.0)
        if INT_SUBTRACT:
            w = (codes - zero.to(tl.int32)[:, None]).to(x.dtype) * scale[:, None]
        else:
            w = (codes.to(x.dtype) - zero[:, None]) * scale[:, None]
        acc = tl.dot(x, tl.trans(w), acc)
    tl.store(
        out_ptr + m[:, None] * N + n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


def source(act: str, tile: PrefillTile, device: Device) -> Isa:
    def empty(*shape: int, dtype: torch.dtype = ACT_DTYPES[act]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    launch = Launch(
        fn=_source,
        grid=(M // tile.block_m, N // tile.block_n),
        args={
            "out_ptr": empty(M, N),
            "x_ptr": empty(M, K),
            "codes_ptr": empty(N, K // 8, dtype=torch.int32),
            "scales_ptr": empty(N, K // GROUP),
            "zeros_ptr": empty(N, K // GROUP),
            "M": M,
            "N": N,
            "K": K,
            "K8": K // 8,
            "groups": K // GROUP,
        },
        constants={
            "GROUP": GROUP,
            "INT_SUBTRACT": tile.dequant == "int_subtract",
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    return read_isa(compile_launch(launch, device))


def ours(act: str, tile: PrefillTile, device: Device) -> Isa:
    problem = Problem(m=M, n=N, k=K, group=GROUP, act=act, has_zeros=True)
    return read_isa(compile_stem("triton_prefill", problem, device, tile)[-1])


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
    problem = Problem(m=M, n=N, k=K, group=GROUP, act=act, has_zeros=True)
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
    return f"{what}; asymmetric, G={GROUP}, {device.arch}, Triton {triton.__version__}"


def main(arch: str) -> None:
    device, console = known_device(arch), Console(width=120)
    console.print(subtraction_table(device))
    for act in CHOSEN:
        console.print(comparison("every form at one tile", act, form_tiles(act, device), device))
    for act in CHOSEN:
        console.print(comparison("the tiles of the tuning tables", act, production_tiles(act, device), device))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["gfx1151"]))
