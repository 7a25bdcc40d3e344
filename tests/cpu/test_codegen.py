"""Compiling for GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from toy_kernels import toy_matmul, toy_row_sum
from triton.tools.tensor_descriptor import TensorDescriptor

from w4a16.codegen.compile import compile_launch, gpu_target
from w4a16.device import DEVICES, known_device
from w4a16.errors import BadInput
from w4a16.kernels._launch import Launch


@triton.jit
def _copy_tile(out_ptr, x, BLOCK: tl.constexpr):
    tile = x.load([tl.program_id(0) * BLOCK, 0])
    offsets = tl.arange(0, BLOCK)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + tl.program_id(0) * BLOCK * 64 + offsets, tile)


def test_amd_gives_assembly_a_code_object_and_its_resources() -> None:
    compiled = compile_launch(toy_matmul(), known_device("gfx1151"))
    assert compiled.name == "_toy_matmul"
    assert compiled.binary[:4] == b"\x7fELF"
    assert compiled.machine_code == compiled.asm["amdgcn"]
    assert 0 < compiled.registers <= 256
    assert 0 < compiled.scalar_registers <= 108
    assert (compiled.spills, compiled.scratch_bytes, compiled.warps, compiled.lanes) == (0, 0, 4, 32)
    assert compiled.shared_bytes > 0
    assert not compiled.serialised_wgmma


def test_nvidia_gives_sass_and_its_resources() -> None:
    compiled = compile_launch(toy_matmul(), known_device("sm80"))
    assert "HMMA" in compiled.machine_code
    assert ".entry _toy_matmul" in compiled.asm["ptx"]
    assert 0 < compiled.registers <= 255
    assert compiled.scalar_registers == compiled.spills == 0


def test_wgmma_is_checked_for_serialisation() -> None:
    fits = compile_launch(toy_matmul(m=128, blocks=(64, 64, 32)), known_device("sm90"))
    assert "wgmma.mma_async" in fits.asm["ptx"]
    assert not fits.serialised_wgmma
    # 256 accumulators a thread
    assert compile_launch(toy_matmul(m=128, blocks=(128, 256, 32)), known_device("sm90")).serialised_wgmma


@pytest.mark.parametrize("arch", ["gfx1151", "sm90"])
def test_spills_are_counted(arch: str) -> None:
    launch = toy_matmul(m=128, blocks=(64, 128, 32), warps=1)  # 256 accumulators a lane
    compiled = compile_launch(launch, known_device(arch))
    assert compiled.spills > 0
    assert compiled.scratch_bytes > 0


def attributes(launch: Launch) -> str:
    """The kernel's signature as Triton saw it."""
    text = compile_launch(launch, known_device("gfx1151")).asm["ttir"]
    return next(line for line in text.splitlines() if "tt.func public" in line)


def test_arguments_are_specialised_as_triton_does_at_a_call() -> None:
    aligned = attributes(toy_matmul(m=64))
    assert aligned.count("tt.pointer_range = 32") == 3, "small tensors: AMD's buffer instructions apply"
    # out, x, codes, N, K and stride_codes; M is do_not_specialize
    assert aligned.count("tt.divisibility = 16") == 6
    assert attributes(toy_matmul(stride=65)).count("tt.divisibility = 16") == 5
    large = toy_matmul(n=1 << 17, k=1 << 15)
    assert attributes(large).count("tt.pointer_range = 32") == 2, "codes of 2 GiB and more"


def test_an_argument_of_one_is_a_constant_unless_not_specialised() -> None:
    launch = toy_matmul(m=1)
    assert "%M" in attributes(launch)
    assert "%stride_codes" not in attributes(replace(launch, args={**launch.args, "stride_codes": 1}))


def test_tensor_descriptors_compile() -> None:
    x = torch.empty((128, 64), dtype=torch.bfloat16, device="meta")
    launch = Launch(
        fn=_copy_tile,
        grid=(4,),
        args={"out_ptr": x, "x": TensorDescriptor.from_tensor(x, [32, 64])},
        constants={"BLOCK": 32},
    )
    assert "cp.async.bulk.tensor" in compile_launch(launch, known_device("sm90")).asm["ptx"]
    assert compile_launch(launch, known_device("gfx1151")).spills == 0


def test_gluon_kernels_compile() -> None:
    assert compile_launch(toy_row_sum(), known_device("gfx1151")).name == "_toy_row_sum"
    assert compile_launch(toy_row_sum(), known_device("sm80")).name == "_toy_row_sum"


def test_every_gpu_has_a_target_and_a_cpu_has_none() -> None:
    assert {gpu_target(d).warp_size for d in DEVICES.values() if d.arch != "cpu"} == {32, 64}
    with pytest.raises(BadInput, match="got cpu, wanted a GPU"):
        gpu_target(DEVICES["cpu"])
