"""Machine code of real kernels in the gfx11 emulator, with the oldest and the newest supported Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from toy_kernels import toy_matmul, toy_row_sum

from w4a16.codegen.compile import compile_launch
from w4a16.codegen.gfx11.faults import Fault
from w4a16.codegen.gfx11.launch import execute
from w4a16.codegen.mutate import mutants, mutation_check
from w4a16.codegen.verify import checks, run, stems, variants
from w4a16.device import known_device
from w4a16.errors import BadInput
from w4a16.kernels._launch import Launch
from w4a16.tuning.tiles import PrefillTile
from w4a16.weight import pack_nibbles

ROOT = Path(__file__).parents[2]
GFX1151 = known_device("gfx1151")


def matmul(act: torch.dtype) -> tuple[Launch, torch.Tensor]:
    """A toy launch over CPU tensors, and what it should write."""
    codes, x = torch.randint(0, 16, (64, 96)), torch.randn(40, 96).to(act)
    launch = toy_matmul(m=40, n=64, k=96, act=act)
    tensors = {"out_ptr": torch.full((40, 64), float("nan"), dtype=act), "x_ptr": x, "codes_ptr": pack_nibbles(codes)}
    return replace(launch, args={**launch.args, **tensors}), x.float() @ (codes.float() - 8).T


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1151"])
@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16])
def test_a_matmul_gives_its_product(arch: str, act: torch.dtype) -> None:
    launch, wanted = matmul(act)
    assert execute(compile_launch(launch, known_device(arch))).executed > 1000
    torch.testing.assert_close(launch.args["out_ptr"].float(), wanted, rtol=2**-8, atol=2**-6)


def test_a_gluon_kernel_runs() -> None:
    launch = toy_row_sum(k=1024)
    x, out = torch.randn(1024).half(), torch.empty(512)
    execute(compile_launch(replace(launch, args={"out_ptr": out, "x_ptr": x, "K": 1024}), GFX1151))
    torch.testing.assert_close(out, x.float().view(2, 512).sum(0))


@triton.jit
def _shape(out_ptr):
    x, y = tl.program_id(0), tl.program_id(1)
    tl.store(out_ptr + y * tl.num_programs(0) + x, tl.num_programs(0) * 100 + tl.num_programs(1))


def test_the_shape_of_the_grid_is_passed() -> None:
    out = torch.zeros(12, dtype=torch.int32)
    execute(compile_launch(Launch(fn=_shape, grid=(3, 4), args={"out_ptr": out}, constants={}), GFX1151))
    assert (out == 304).all()


def test_a_pointer_past_its_tensor_faults() -> None:
    launch, _ = matmul(torch.float16)
    short = replace(launch, args={**launch.args, "codes_ptr": launch.args["codes_ptr"][:40]})
    with pytest.raises(Fault, match="outside every argument"):
        execute(compile_launch(short, GFX1151))


def test_a_lost_barrier_faults() -> None:
    launch, _ = matmul(torch.float16)
    compiled = compile_launch(launch, GFX1151)
    text = compiled.asm["amdgcn"]
    assert "s_barrier" in text
    with pytest.raises(Fault, match=r"no barrier between them|before it was written"):
        execute(compiled, text.replace("s_barrier", "s_nop 0"))


def test_every_kernel_has_checks_and_every_form_a_variant() -> None:
    assert {"gfx11_moe", "gfx11_prefill", "triton_decode", "triton_prefill", "triton_moe"} <= set(stems())
    for stem in stems():
        assert list(islice(checks(GFX1151, stem), 1))
    tile = PrefillTile(block_m=32, block_n=32, block_k=32, warps=4)
    assert {"magic", "carrier", "group_sum"} <= {variant.dequant for variant in variants(tile, "fp16")}


def test_other_devices_and_kernels_are_refused() -> None:
    with pytest.raises(BadInput, match="wanted a gfx11 GPU"):
        list(checks(known_device("gfx1201"), "triton_prefill"))
    with pytest.raises(BadInput, match="got cpu_decode, wanted gfx11_moe, "):
        list(checks(GFX1151, "cpu_decode"))


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1151"])
@pytest.mark.parametrize("stem", ["triton_decode", "triton_prefill"])
def test_linear_kernels_pass(arch: str, stem: str) -> None:
    device = known_device(arch)
    for check in islice(checks(device, stem), 0, None, 6):
        outcome = run(check, device)
        assert outcome.passed, (check, outcome)


def test_mutants_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    text = compile_launch(matmul(torch.float16)[0], GFX1151).asm["amdgcn"]
    first, again = ([mutant.new for mutant in islice(mutants(text, 5), 4)] for _ in range(2))
    assert first == again, "a seed names the changes"
    assert mutation_check(GFX1151, ["triton_prefill"], 3, 1, print) == 0
    assert "of 3 changes noticed" in capsys.readouterr().out


@pytest.mark.parametrize("version", sorted(path.name for path in (ROOT / ".triton").glob("*")))
def test_other_tritons(version: str) -> None:
    code = (
        "from itertools import islice\n"
        "from w4a16.codegen.verify import checks, run\n"
        "from w4a16.device import known_device\n"
        "for arch in ('gfx1100', 'gfx1151'):\n"
        "    device = known_device(arch)\n"
        "    for stem in ('gfx11_prefill', 'triton_decode', 'triton_prefill'):\n"
        "        for check in islice(checks(device, stem), 0, None, 9):\n"
        "            outcome = run(check, device)\n"
        "            assert outcome.passed, (check, outcome)\n"
    )
    path = os.pathsep.join([str(ROOT / ".triton" / version), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
