"""The reading of machine code: listings, loops, classes, the matrix-issue share and occupancy."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import typer
from toy_kernels import toy_matmul, toy_row_sum
from typer.testing import CliRunner

from w4a16.cli_isa import changed, isa
from w4a16.codegen.classes import CLASSES, classify
from w4a16.codegen.compile import compile_launch
from w4a16.codegen.isa import Isa, read_isa
from w4a16.codegen.listing import Listing, parse_amdgcn, parse_sass
from w4a16.codegen.loops import find_loops, hot_loop
from w4a16.codegen.occupancy import occupancy
from w4a16.codegen.report import Column, isa_table, opcode_table
from w4a16.device import DEVICES, known_device
from w4a16.errors import BadInput, Unsupported
from w4a16.tuning.tiles import PrefillTile

AMD = """
\t.text
kernel:                                 ; @kernel
; %bb.0:
\ts_load_b64 s[0:1], s[0:1], 0x0
.LBB0_1:                                ; the outer loop
\tv_mov_b32_e32 v0, 0
.LBB0_2:                                ; a wait, no matrix instructions
\ts_nop 0
\ts_nop 0
\ts_nop 0
\ts_cbranch_scc1 .LBB0_2
\ts_branch .LBB0_4
.LBB0_3:                                ; a block of the hot loop that stands before its header
\tv_dual_mov_b32 v1, v2 :: v_dual_add_f32 v3, v4, v5
\tv_exp_f32_e32 v6, v6
.LBB0_4:
\tv_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]
\tv_and_b32_e64 v9, v9, s2
\ts_cbranch_vccnz .LBB0_3
; %bb.5:
\ts_cbranch_scc0 .LBB0_1
\ts_endpgm
.Lfunc_end0:
\tv_mov_b32_e32 v0, 0
"""

SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0020*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0030*/                   LDS.128 R4, [R0] ;
.L_x_1:
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""


def opcodes_of_hot_loop(listing: Listing, arch: str) -> list[str]:
    loop = hot_loop(listing, lambda opcode: classify(opcode, arch) == "matrix")
    assert loop is not None
    return [i.opcode for i in loop.instructions]


def test_amd_listing_ends_with_its_function_and_drops_encodings() -> None:
    listing = parse_amdgcn(AMD)
    assert [i.opcode for i in listing.instructions][-1] == "s_endpgm"
    assert "v_mov_b32" in [i.opcode for i in listing.instructions]
    assert "v_dual_mov_b32+add_f32" in [i.opcode for i in listing.instructions]


def test_hot_loop_is_the_innermost_with_matrix_instructions() -> None:
    listing = parse_amdgcn(AMD)
    assert len(find_loops(listing)) == 3
    assert opcodes_of_hot_loop(listing, "gfx1151") == [
        "v_dual_mov_b32+add_f32",
        "v_exp_f32",
        "v_wmma_f32_16x16x16_f16",
        "v_and_b32",
        "s_cbranch_vccnz",
    ]


def test_hot_loop_without_matrix_instructions_is_the_longest_innermost() -> None:
    listing = parse_amdgcn(AMD.replace("v_wmma_f32_16x16x16_f16", "v_dot2_f32_f16"))
    assert "v_dot2_f32_f16" in opcodes_of_hot_loop(listing, "gfx1151")


def test_sass_loops_pass_through_predicated_branches_and_not_past_exit() -> None:
    listing = parse_sass(SASS)
    assert opcodes_of_hot_loop(listing, "sm90") == ["HMMA.16816.F32", "BRA.U", "LDS.128", "BRA"]
    assert len(find_loops(listing)) == 1, "the padding after EXIT is unreachable"


@pytest.mark.parametrize("opcode", ["BRX R4", "BRXU UR4"])
def test_sass_is_followed_through_a_table_of_branches(opcode: str) -> None:
    branch = f'        /*0000*/ {opcode} -0x10 (*"BRANCH_TARGETS .L_x_0,.L_x_2"*);'
    listing = parse_sass(SASS.replace(".L_x_0:", f"{branch}\n.L_x_0:"))
    assert opcodes_of_hot_loop(listing, "sm90") == ["HMMA.16816.F32", "BRA.U", "LDS.128", "BRA"]
    assert len(find_loops(listing)) == 2, "what stands after EXIT is reached through the table"


def test_a_listing_without_loops_has_no_hot_loop() -> None:
    assert hot_loop(parse_amdgcn("kernel:\n\tv_mov_b32 v0, 0\n\ts_endpgm\n"), lambda _: False) is None


@pytest.mark.parametrize(
    ("arch", "opcode", "kind"),
    [
        ("gfx1151", "v_wmma_f32_16x16x16_bf16", "matrix"),
        ("gfx942", "v_mfma_f32_32x32x8_f16", "matrix"),
        ("gfx1151", "v_dot2_bf16_bf16", "vector"),
        ("gfx1151", "ds_load_b128", "shared"),
        ("gfx1151", "buffer_load_b32", "memory"),
        ("gfx1151", "s_delay_alu", "wait"),
        ("gfx1151", "s_cbranch_scc1", "branch"),
        ("gfx1151", "s_buffer_load_b32", "scalar"),
        ("sm90", "HGMMA.64x16x16.F32.BF16", "matrix"),
        ("sm90", "HFMA2.MMA", "vector"),
        ("sm90", "LDGSTS.E.BYPASS.128", "memory"),
        ("sm90", "LDGDEPBAR", "wait"),
        ("sm90", "LDSM.16.M88.4", "shared"),
        ("sm90", "UTMALDG.2D", "memory"),
        ("sm90", "UIADD3", "scalar"),
        ("sm90", "WARPGROUP.DEPBAR.LE", "wait"),
        ("sm90", "LOP3.LUT", "vector"),
    ],
)
def test_classes(arch: str, opcode: str, kind: str) -> None:
    assert classify(opcode, arch) == kind


def test_matrix_share_counts_the_cycles_of_the_vector_port() -> None:
    reading = read_isa(compile_launch(toy_matmul(), known_device("gfx1151")))
    quarter = sum(n for op, n in reading.opcodes.items() if re.match(r"v_mul_(lo|hi)|v_exp|v_mad_[iu]64", op))
    matrix, vector = reading.counts["matrix"], reading.counts["vector"]
    assert matrix == 4
    assert reading.matrix_share == pytest.approx(32 * matrix / (32 * matrix + vector + 3 * quarter))
    # two of gfx12's WMMA take the time of one of gfx11's
    assert read_isa(compile_launch(toy_matmul(), known_device("gfx1201"))).matrix_share < reading.matrix_share


@pytest.mark.parametrize("arch", [arch for arch in DEVICES if arch != "cpu"])
def test_every_gpu_is_read(arch: str) -> None:
    columns = []
    for launch in (toy_matmul(), toy_row_sum(lanes=64 if arch == "gfx942" else 32)):
        compiled = compile_launch(launch, known_device(arch))
        columns.append(Column(title=compiled.name, reading=read_isa(compiled)))
    matmul, row_sum = (column.reading for column in columns)
    assert matmul.looped
    assert row_sum.looped
    assert matmul.counts["matrix"] > 0
    assert row_sum.counts["matrix"] == 0
    assert min(matmul.counts[kind] for kind in ("vector", "shared", "memory")) > 0
    assert sum(matmul.counts.values()) == sum(matmul.opcodes.values())
    assert list(matmul.counts) == list(CLASSES)
    assert (matmul.matrix_share is not None) == arch.startswith(("gfx11", "gfx12"))
    assert matmul.spills == matmul.scratch_bytes == 0
    assert matmul.waves > 0
    assert isa_table(columns).row_count == 17
    assert opcode_table(columns).row_count == len(matmul.opcodes | row_sum.opcodes)


@pytest.mark.parametrize("arch", ["gfx1151", "gfx1201", "sm80", "sm90"])
@pytest.mark.parametrize(("blocks", "warps"), [((32, 64, 32), 4), ((64, 64, 64), 4), ((128, 128, 32), 8)])
def test_weights_per_trip_are_counted_from_the_matrix_instructions(
    arch: str, blocks: tuple[int, int, int], warps: int
) -> None:
    launch = toy_matmul(m=128, blocks=blocks, warps=warps)
    reading = read_isa(compile_launch(launch, known_device(arch)))
    weights = blocks[1] * blocks[2]
    assert reading.weights == weights
    assert reading.vector_per_weight == reading.counts["vector"] * reading.lanes * warps / weights


def test_a_kernel_without_matrix_instructions_multiplies_no_weights() -> None:
    reading = read_isa(compile_launch(toy_row_sum(), known_device("gfx1151")))
    assert reading.weights == 0
    assert reading.vector_per_weight is None


def test_a_loop_inside_a_group_is_counted_with_the_loop_over_groups() -> None:
    compiled = compile_launch(toy_matmul(), known_device("gfx1151"))
    text = """
kernel:
.LBB0_1:
\tv_mov_b32 v0, 0
.LBB0_2:
\tv_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]
\tv_and_b32 v9, v9, v9
\ts_cbranch_scc1 .LBB0_2
\tv_fma_f32 v0, v1, v2, v3
\ts_cbranch_scc0 .LBB0_1
\ts_endpgm
"""
    nested = replace(
        compiled,
        asm={"amdgcn": text},
        warps=1,
        launch=replace(compiled.launch, constants={"BLOCK_M": 16, "BLOCK_N": 16, "GROUP": 64}),
    )
    reading = read_isa(nested)
    assert (reading.trips, reading.weights) == (4, 64 * 16)
    assert reading.opcodes["v_wmma_f32_16x16x16_f16"] == reading.opcodes["v_and_b32"] == 4
    assert reading.opcodes["v_mov_b32"] == reading.opcodes["v_fma_f32"] == 1
    flat = read_isa(replace(nested, launch=replace(compiled.launch, constants={"BLOCK_M": 16, "BLOCK_N": 16})))
    assert (flat.trips, flat.weights, flat.counts["vector"]) == (1, 16 * 16, 1)


def llvm_occupancy(launch_warps: int, arch: str) -> tuple[int, Isa]:
    """LLVM's own count of waves by registers, and ours, of a kernel that uses no LDS."""
    compiled = compile_launch(toy_matmul(warps=launch_warps, blocks=(64, 64, 32)), known_device(arch))
    return int(re.findall(r"; Occupancy: (\d+)", compiled.machine_code)[0]), read_isa(compiled)


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1150", "gfx1151", "gfx1201"])
@pytest.mark.parametrize("warps", [1, 2])
def test_occupancy_by_registers_is_llvms(arch: str, warps: int) -> None:
    theirs, reading = llvm_occupancy(warps, arch)
    assert occupancy(arch, registers=reading.registers, shared_bytes=0, warps=1) == theirs


def test_occupancy_by_shared_memory_and_programs() -> None:
    assert occupancy("gfx1151", registers=96, shared_bytes=64 * 1024, warps=8) == 4
    assert occupancy("sm90", registers=168, shared_bytes=200 * 1024, warps=8) == 8
    assert occupancy("sm86", registers=32, shared_bytes=0, warps=1) == 16
    with pytest.raises(Unsupported, match="occupancy of sm75 is unknown"):
        occupancy("sm75", registers=32, shared_bytes=0, warps=1)


def test_fp16_and_bf16_compile_to_different_matrix_instructions() -> None:
    found = [
        read_isa(compile_launch(toy_matmul(act=act), known_device("gfx1151"))).opcodes
        for act in (torch.float16, torch.bfloat16)
    ]
    assert found[0]["v_wmma_f32_16x16x16_f16"] == found[1]["v_wmma_f32_16x16x16_bf16"] == 4


def test_the_command_compares_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = PrefillTile(block_m=32, block_n=64, block_k=32, warps=4)
    monkeypatch.setattr("w4a16.tuning.table.tile_for", lambda *_: tile)
    app = typer.Typer()
    app.command()(isa)
    command = ["--kernel", "triton_prefill", "--device", "gfx1151", "--asym", "--opcodes"]
    done = CliRunner().invoke(app, [*command, "--tile", "dequant=float_subtract", "--tile", "block_m=64,warps=2"])
    assert done.exit_code == 0, done.output
    assert "tile of the tuning table: block_m=32 block_n=64 block_k=32 warps=4" in done.output
    assert "v_wmma_f32_16x16x16_bf16" in done.output
    assert "matrix-issue share" in done.output
    assert "s_endpgm" in CliRunner().invoke(app, [*command, "--asm"]).output


def test_fields_of_a_tile_are_changed_as_the_type_they_have() -> None:
    tile = PrefillTile(block_m=32, block_n=64, block_k=32, warps=4)
    wanted = replace(tile, block_m=64, dequant="magic", weight_first=True)
    assert changed(tile, "block_m=64,dequant=magic,weight_first=true") == wanted
    assert changed(tile, "") is tile
    with pytest.raises(BadInput, match="got blockm, wanted block_m, block_n"):
        changed(tile, "blockm=64")
    with pytest.raises(BadInput, match="block_m=64 warps=8"):
        changed(tile, "block_m=64 warps=8")
