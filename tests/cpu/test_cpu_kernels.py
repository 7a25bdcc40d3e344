"""Each linear kernel of the CPU, called directly, against the fp32 reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_close, random_weight

from w4a16 import layouts
from w4a16.dispatch import launcher
from w4a16.dispatch_table import TABLE
from w4a16.kernels import cpu_decode, cpu_prefill
from w4a16.layouts import EXLLAMA, INT4PACK
from w4a16.reference import reference_linear
from w4a16.tuning.tiles import CpuTile, DenseTile
from w4a16.weight import QuantizedWeight

KERNELS = [("cpu_decode", EXLLAMA), ("cpu_prefill", EXLLAMA), ("cpu_int4pack", INT4PACK)]
KERNELS += [("dense", EXLLAMA), ("dense", INT4PACK)]
ACTS = [torch.bfloat16, torch.float16, torch.float32]


def call(stem: str, layout: str, weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.full((x.shape[0], weight.n), float("nan"), dtype=x.dtype)
    packed = layouts.pack(weight, layout=layout)
    tile = DenseTile(workspace_mib=1) if stem == "dense" else CpuTile(block_n=64)
    launcher(stem)(out=out, x=x, weight=packed, bias=bias, tile=tile)
    return out


@pytest.mark.parametrize(("stem", "layout"), KERNELS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 16, 17, 70])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(8, 32, 32), (72, 384, 64), (136, 256, 128), (40, 480, 480), (200, 96, 96)]
)
def test_shapes(stem: str, layout: str, m: int, n: int, k: int, group: int) -> None:
    weight, x = random_weight(n, k, group=group, asym=True), torch.randn(m, k).bfloat16()
    assert_close(call(stem, layout, weight, x, None), reference_linear(x, weight))


@pytest.mark.parametrize(("stem", "layout"), KERNELS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("m", [1, 9])
def test_dtypes_zero_points_strides_and_bias(stem: str, layout: str, act: torch.dtype, asym: bool, m: int) -> None:
    if stem == "cpu_int4pack" and act != torch.bfloat16:
        assert "bf16" in str(next(row.act for row in TABLE if row.stem == stem))
        return
    weight = random_weight(72, 256, group=128, asym=asym, act=act)
    x, bias = torch.randn(m, 300, dtype=act)[:, 20:276], torch.randn(72, dtype=act)
    assert_close(call(stem, layout, weight, x, bias), reference_linear(x, weight, bias))


@pytest.mark.parametrize("stem", ["cpu_decode", "cpu_prefill", "dense"])
@pytest.mark.parametrize("group", [8, 16, 24, 48])
def test_odd_groups(stem: str, group: int) -> None:
    weight = random_weight(24, 6 * group, group=group, asym=True, act=torch.float32)
    for m in (1, 7):
        x = torch.randn(m, 6 * group)
        assert_close(call(stem, EXLLAMA, weight, x, None), reference_linear(x, weight))


@pytest.mark.parametrize(("stem", "layout"), KERNELS)
def test_many_threads_at_once(stem: str, layout: str) -> None:
    weight, x = random_weight(256, 1024, group=128, asym=True), torch.randn(8, 1024).bfloat16()
    wanted = call(stem, layout, weight, x, None)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: call(stem, layout, weight, x, None), range(16)))
    assert all(torch.equal(got, wanted) for got in results)


@pytest.mark.parametrize("kernel", [cpu_decode, cpu_prefill])
def test_threads_do_not_change_the_bits(kernel: object, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = kernel.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    weight, x = random_weight(256, 1024, group=128, asym=True), torch.randn(8, 1024).bfloat16()
    wanted = call(stem, EXLLAMA, weight, x, None)
    for threads in (1, 3, 8):
        monkeypatch.setattr(kernel, "threads_for", lambda *_, threads=threads: threads)
        assert torch.equal(call(stem, EXLLAMA, weight, x, None), wanted)


def test_without_openmp_python_threads_run_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    from w4a16.kernels import _cpu_threads

    weight, x = random_weight(256, 1024, group=128, asym=True), torch.randn(8, 1024).bfloat16()
    wanted = call("cpu_decode", EXLLAMA, weight, x, None)
    monkeypatch.setattr(_cpu_threads, "_openmp", lambda: None)
    monkeypatch.setattr(cpu_decode, "threads_for", lambda *_: 3)
    assert torch.equal(call("cpu_decode", EXLLAMA, weight, x, None), wanted)
