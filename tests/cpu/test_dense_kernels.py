"""dense and its dequantising kernel: the workspace is bounded, every block lands in its place, GPUs can run it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16 import DEVICES, Problem, layouts
from w4a16.codegen.compile import compile_launch
from w4a16.codegen.gfx11.launch import execute
from w4a16.dispatch import choose
from w4a16.kernels import dense as module
from w4a16.kernels._dense_rows import dense_rows
from w4a16.kernels.dense import block_rows, dense, dequantize_all
from w4a16.layouts import EXLLAMA, INT4PACK, SKINNY, PackedWeight
from w4a16.reference import reference_linear
from w4a16.tuning.table import TuningRow, device_rows
from w4a16.tuning.tiles import DenseTile

SMALL = DenseTile(workspace_mib=1)  # 64 rows of K=4096 in fp32


@pytest.mark.parametrize("layout", [EXLLAMA, SKINNY, INT4PACK])
@pytest.mark.parametrize("n", [64, 200, 257])
@pytest.mark.parametrize("bias", [False, True])
def test_more_blocks_than_one(layout: str, n: int, bias: bool) -> None:
    weight = random_weight(n, 4096, group=128, asym=True)
    x, b = torch.randn(5, 4096).bfloat16(), torch.randn(n).bfloat16() if bias else None
    out = torch.full((5, n), torch.nan, dtype=torch.bfloat16)
    dense(out=out, x=x, weight=layouts.pack(weight, layout=layout), bias=b, tile=SMALL)
    assert_close(out, reference_linear(x, weight, b))


@pytest.mark.parametrize("workspace_mib", [1, 64])
@pytest.mark.parametrize("k", [64, 4096, 18944, 1 << 20])
def test_the_workspace_is_bounded(workspace_mib: int, k: int) -> None:
    rows = block_rows(DenseTile(workspace_mib=workspace_mib), k, torch.bfloat16)
    assert rows % 64 == 0
    assert rows * k * 2 <= max(workspace_mib << 20, 64 * k * 2)


def test_only_the_rows_of_a_block_are_dequantised_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One workspace serves every block of a call."""
    seen: list[tuple[int, int]] = []

    def note(out: torch.Tensor, weight: PackedWeight, start: int) -> None:
        seen.append((out.data_ptr(), len(out)))
        inner(out, weight, start)

    inner = module.dequantize_rows
    monkeypatch.setattr(module, "dequantize_rows", note)
    packed = layouts.pack(random_weight(200, 4096, group=128))
    dense(out=torch.empty(3, 200), x=torch.randn(3, 4096), weight=packed, bias=None, tile=SMALL)
    assert [rows for _, rows in seen] == [64, 64, 64, 8]
    assert len({at for at, _ in seen}) == 1


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_all_of_a_weight_block_by_block(layout: str) -> None:
    weight = random_weight(200, 256, group=64, asym=True, act_order=True)
    out = torch.full((200, 256), torch.nan, dtype=torch.float32)
    dequantize_all(out, layouts.pack(weight, layout=layout), 64)
    assert torch.equal(out, replace(weight, perm=None).dequantize(torch.float32))


@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx1151", "gfx1201", "gfx942"])
@pytest.mark.parametrize("asym", [False, True])
def test_the_dequantising_kernel_compiles_without_spills(arch: str, asym: bool) -> None:
    weight = layouts.pack(random_weight(64, 1024, group=128, asym=asym), layout=SKINNY).to("meta")
    out = torch.empty(64, 1024, dtype=torch.bfloat16, device="meta")
    compiled = compile_launch(dense_rows(out, weight, 0), DEVICES[arch])
    assert compiled.spills == 0
    if arch.startswith("sm"):
        assert "st.global.v4" in compiled.asm["ptx"]
    else:
        assert "_store_b128" in compiled.machine_code or "_store_dwordx4" in compiled.machine_code


@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asym", [False, True])
def test_gfx11_machine_code_writes_the_bits_of_dequantising_in_torch(act: torch.dtype, asym: bool) -> None:
    """Rows past N, words past K and padded rows: nothing else is touched, as the emulator faults there."""
    weight = random_weight(13, 1152, group=128, asym=asym, act=act)
    packed = layouts.pad_rows(layouts.pack(weight, layout=SKINNY))
    out = torch.full((13, 1216), torch.nan, dtype=act)
    execute(compile_launch(dense_rows(out[:, :1152], packed, 0), DEVICES["gfx1151"]))
    assert torch.equal(out[:, :1152], weight.dequantize())
    assert out[:, 1152:].isnan().all()


def test_a_tuning_row_puts_it_before_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DEVICES["sm90"]
    tile = DenseTile(workspace_mib=64, first=True)
    row = TuningRow(
        stem="dense", table="sm90", place=1, tile=tile, why="", measured="", conditions={"m_min": 1024, "k_min": 4096}
    )
    stems = {}
    for added in ((), (row,)):
        monkeypatch.setattr(
            "w4a16.tuning.table.device_rows",
            lambda stem, at, added=added: (*(r for r in added if r.stem == stem), *device_rows(stem, at)),
        )
        choose.cache_clear()
        for m, k in ((16, 4096), (17, 4096), (1023, 4096), (1024, 4096), (2048, 2048)):
            problem = Problem(m=m, n=4096, k=k, group=128)
            stems[len(added), m, k] = choose(problem, device, SKINNY).row.stem
    choose.cache_clear()
    assert {at for at, stem in stems.items() if stem == "dense"} == {(1, 1024, 4096)}
