"""What fails half-way fails once, in one sentence, leaves what was there before, and works the next time."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import assert_close, random_weight
from numba.core import caching
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from triton.compiler.errors import CompilationError

import w4a16
from models import RECIPES, make_checkpoint
from w4a16 import DEVICES, KernelFailed, OverBudget, layouts, linear
from w4a16.codegen.compile import compile_launch
from w4a16.kernels import _cpu_jit, _launch, cpu_decode, cpu_prefill
from w4a16.kernels._dense_rows import dense_rows
from w4a16.kernels._launch import Launch
from w4a16.layouts import SKINNY
from w4a16.quantize import quantize_model
from w4a16.reference import reference_linear


class OutOfMemoryAt(TorchDispatchMode):
    """Fails the allocation that brings what was allocated inside to `limit` bytes."""

    def __init__(self, limit: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.limit, self.error, self.bytes = limit, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and out.device.type == "cpu":
            self.bytes += out.nbytes
            if self.bytes >= self.limit:
                raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
        return out


@contextmanager
def failing_packs(monkeypatch: pytest.MonkeyPatch, limit: int, error: type[Exception]) -> Iterator[None]:
    """Only what w4a16 allocates counts: reading and packing."""
    from w4a16.plugins import _layers

    whole, mode = _layers.pack_all, OutOfMemoryAt(limit, error)

    def pack(*arguments: Any, **options: Any) -> Any:
        with mode:
            return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(_layers, "pack_all", pack)
        yield


@pytest.mark.parametrize(("share", "error"), [(0.0, torch.OutOfMemoryError), (0.5, RuntimeError), (0.95, MemoryError)])
def test_out_of_memory_in_the_middle_of_a_load(
    share: float, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_checkpoint("qwen3_moe", RECIPES["awq"], tmp_path / "model")
    before = w4a16.load(str(made.folder))
    stock = dict(AUTO_QUANTIZER_MAPPING)
    limit = max(1, int(share * sum(line.packed_bytes for line in before.w4a16_report().lines)))
    with (
        failing_packs(monkeypatch, limit, error),
        pytest.raises(OverBudget, match=r"weight \d+ of 10: got out of memory"),
    ):
        w4a16.load(str(made.folder))
    assert stock == AUTO_QUANTIZER_MAPPING  # the hook on transformers is gone
    ids = torch.randint(3, 90, (1, 6))
    with torch.no_grad():
        assert torch.equal(w4a16.load(str(made.folder))(ids).logits, before(ids).logits)


def test_another_error_while_loading_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_checkpoint("qwen3", RECIPES["awq"], tmp_path / "model")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("w4a16.plugins._layers.pack_all", fail)
    with pytest.raises(RuntimeError, match="something else"):
        w4a16.load(str(made.folder))


@pytest.fixture
def recompiled() -> Iterator[None]:
    caches = (cpu_decode._gemv, cpu_decode._tile, cpu_prefill._gemm)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("m", "kernel"), [(1, "cpu_decode_gemv"), (3, "cpu_decode_tile"), (40, "cpu_prefill_gemm")])
@pytest.mark.usefixtures("recompiled")
def test_a_cpu_kernel_that_does_not_compile(m: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(64, 128, group=64)
    packed, x = layouts.pack(weight), torch.randn(m, 128).bfloat16()

    def fail(*_: object, **__: object) -> None:
        raise ValueError("LLVM said no\nand much more")

    with monkeypatch.context() as patch:
        patch.setattr(_cpu_jit, "cfunc", fail)
        with pytest.raises(KernelFailed, match=rf"{kernel}: it did not compile \(ValueError: LLVM said no\)\. .*dense"):
            linear(x, packed)
    assert_close(linear(x, packed), reference_linear(x, weight))


@pytest.mark.usefixtures("recompiled")
def test_a_cpu_kernel_with_nowhere_to_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's own words when neither the package, nor NUMBA_CACHE_DIR, nor the home can be written."""
    weight = random_weight(64, 128, group=64)
    packed, x = layouts.pack(weight), torch.randn(1, 128).bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
        patch.setattr(caching.CodeLibraryCacheImpl, "_locator_classes", [])
        with pytest.raises(KernelFailed, match=r"gemv: its compiler's cache cannot be written.*NUMBA_CACHE_DIR"):
            linear(x, packed)
    assert_close(linear(x, packed), reference_linear(x, weight))


class Compiler:
    """Stands for a jit function; `warmup` fails as often as there are errors, then compiles."""

    __name__ = "_toy"
    arg_names: ClassVar = ["x_ptr"]

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def warmup(self, *_: object, **__: object) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "compiled"


def toy_launch(compiler: Compiler) -> Launch:
    return Launch(fn=compiler, grid=(1,), args={"x_ptr": torch.zeros(1)}, constants={})


def test_a_gpu_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(_launch, "launcher", lambda kernel, cluster: lambda *_: ran.append(kernel))
    launch = toy_launch(Compiler(CompilationError("def _toy(): ...", None, "tl.dot takes no int64")))  # type: ignore[arg-type]
    known = set(_launch._compiled)
    with pytest.raises(KernelFailed, match=r"_toy: it did not compile \(CompilationError: .*report it"):
        launch.run()
    assert set(_launch._compiled) == known
    launch.run()
    launch.run()
    assert ran == ["compiled"] * 2
    for key in set(_launch._compiled) - known:
        del _launch._compiled[key]


def test_a_gpu_kernel_on_a_machine_without_its_driver() -> None:
    packed = layouts.pack(random_weight(8, 64, group=32), layout=SKINNY)
    with pytest.raises(KernelFailed, match="_dense_rows: it did not compile"):
        dense_rows(torch.empty(8, 64, dtype=torch.bfloat16), packed, 0).run()


def test_a_gpu_kernel_whose_compilers_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own compiler, into a folder that cannot be; file permissions would not stop the superuser."""
    (tmp_path / "file").touch()
    launch = dense_rows(
        torch.empty(8, 96, dtype=torch.bfloat16, device="meta"),
        layouts.pack(random_weight(8, 96, group=48), layout=SKINNY).to("meta"),
        0,
    )
    toy = Compiler()
    toy.warmup = lambda *_, **__: compile_launch(launch, DEVICES["sm90"])  # type: ignore[method-assign]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(_launch, "launcher", lambda kernel, cluster: lambda *_: None)
    with pytest.raises(KernelFailed, match=r"_toy: its compiler's cache cannot be written .*Set TRITON_CACHE_DIR to"):
        toy_launch(toy).run()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    toy_launch(toy).run()
    assert any((tmp_path / "cache").iterdir())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A real refusal of the system's in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def dense_folder(folder: Path) -> Path:
    made = make_checkpoint("qwen3", RECIPES["ct"], folder / "model")
    made.dense()
    return folder / "model-dense"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["a shard", "a tokenizer file"])
def test_a_full_disk_while_quantising(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = dense_folder(tmp_path), tmp_path / "out"
    (source / "tokenizer.json").write_text("{}")
    (tmp_path / "kept").write_text("kept")
    before = everything(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "a tokenizer file":
            patch.setattr(shutil, "copyfile", full)
        with (
            files_of_at_most(20_000 if where == "a shard" else 1 << 40),
            pytest.raises(OverBudget, match=r"out: got a full disk after \d+\.\d MB.*Nothing is left behind"),
        ):
            quantize_model(source, out, group=32)
    assert everything(tmp_path) == before
    quantize_model(source, out, group=32)
    assert w4a16.load(str(out)).w4a16_report().bytes["packed"] > 0
