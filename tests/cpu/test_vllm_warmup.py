"""What the vLLM plugin compiles before serving: one row count for each code, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton import knobs

from w4a16.bench.warm import distinct
from w4a16.codegen.compile import compiled_kernel
from w4a16.codegen.stems import launches
from w4a16.compat import compiled_anew
from w4a16.device import Device, known_device
from w4a16.plugins import _vllm_warmup as warmup
from w4a16.problem import Problem

MOST = 600
LINEAR = Problem(m=1, n=4096, k=12288, group=128)
EXPERTS = Problem(m=1, n=1536, k=2048, group=128, experts=128, top_k=8)


@pytest.fixture(autouse=True)
def nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, empty in (("_wanted", {}), ("_warm", set()), ("_ahead", set())):
        monkeypatch.setattr(warmup, name, empty)


@pytest.mark.parametrize("kind", [warmup.Kind(LINEAR), warmup.Kind(LINEAR, True), warmup.Kind(EXPERTS)])
def test_row_counts_find_every_code(kind: warmup.Kind) -> None:
    device = known_device("sm90")
    counts = warmup.row_counts(kind, MOST, device)
    assert counts[0] == 1
    assert counts[-1] <= MOST

    def codes(rows: list[int]) -> int:
        return len(distinct([replace(kind.problem, m=m) for m in rows], device, bias=kind.bias))

    assert codes(counts) == codes(list(range(1, MOST + 1)))


@pytest.mark.parametrize("cold", [True, False])
def test_each_kind_runs_once(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, device = warmup.Kind(LINEAR), known_device("sm90")
    ran: list[int] = []
    compiled: list[str] = []

    def compile_ahead(device: Device, log: object) -> None:
        warmup._ahead.add(kind)
        compiled.append(device.arch)

    monkeypatch.setattr("w4a16.compat.compiled_anew", lambda: nullcontext(["_sm90_prefill"][:cold]))
    monkeypatch.setattr(warmup, "compile_ahead", compile_ahead)
    warmup._wanted[kind] = MOST
    for _ in range(2):
        warmup.warm_up(kind, device, ran.append, lambda *_: None)
    assert ran == warmup.row_counts(kind, MOST, device)
    assert compiled == ["sm90"][:cold]


def test_what_triton_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel is compiled anew where its cache is empty; who listened before still does."""
    heard: list[bool] = []
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: heard.append(cache_hit))
    device = known_device("sm90")
    launch = launches("sm90_moe", replace(EXPERTS, m=16), device, ids=warmup.IDS)[-1]
    found = []
    for _ in range(2):
        with compiled_anew() as names:
            compiled_kernel(launch, device)
        found.append(names)
    assert found == [[launch.fn.__name__], []]
    assert heard == [False, True]


def test_experts_are_compiled_for_the_ids_they_get() -> None:
    stem, problem, tile, device, place, bias, ids = next(
        work for work in distinct([EXPERTS], known_device("sm90"), ids=warmup.IDS) if work[4] == 0
    )
    arguments = launches(stem, problem, device, tile, bias=bias, ids=ids)[place].args.values()
    dtypes = {value.dtype for value in arguments if isinstance(value, torch.Tensor)}
    assert torch.int32 in dtypes
    assert torch.int64 not in dtypes


@pytest.mark.parametrize(("kind", "arch"), [(warmup.Kind(LINEAR), "cpu"), (warmup.Kind(EXPERTS), "sm90")])
def test_nothing_runs(kind: warmup.Kind, arch: str) -> None:
    """On a CPU, which compiles nothing; and where vLLM was told not to compile ahead, so that nothing is wanted."""
    warmup._wanted[warmup.Kind(LINEAR)] = MOST
    warmup.warm_up(kind, known_device(arch), lambda m: pytest.fail(f"ran {m} rows"), print)


def test_compilers_run_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of a CPU, they have nothing to compile."""
    monkeypatch.setattr(warmup, "row_counts", lambda *_: [1, 8])
    said: list[str] = []
    warmup._wanted |= {warmup.Kind(LINEAR): MOST, warmup.Kind(LINEAR, True): MOST}
    warmup.compile_ahead(known_device("cpu"), lambda line, *values: said.append(line % values))
    assert len(said) == 1
    assert said[0].startswith("w4a16 compiled 0 kernels in")


KEYS = """
import importlib, sys
from triton.runtime.jit import JITFunction
from w4a16.compat import settle_key

stems = ("sm90_prefill", "sm90_decode", "sm90_moe", "sm90_moe_decode", "triton_decode")
found = {}
for stem in stems:
    module = importlib.import_module(f"w4a16.kernels.{stem}")
    found |= {f"{stem}.{name}": fn for name, fn in vars(module).items() if isinstance(fn, JITFunction)}
for name in sorted(found, reverse=sys.argv[1] == "backwards"):
    settle_key(found[name])
print({name: found[name].cache_key for name in sorted(found)})
"""


def test_keys_are_the_same_in_every_process() -> None:
    """Whatever a process compiled before, it finds in Triton's cache what another put there."""

    def keys(order: str) -> str:
        command = [sys.executable, "-c", KEYS, order]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert keys("forwards") == keys("backwards")
