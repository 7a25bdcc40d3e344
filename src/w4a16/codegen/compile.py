"""Compiles a Launch for any known GPU, without that GPU: machine code, registers, spills, shared memory.

The signature, the constants and the attributes (16-byte alignment, divisibility by 16, the value 1, 32-bit pointer
ranges) come from Triton's own binder, so this is the code that the same call would run on that device.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from ..compat import settle_key
from ..device import Device
from ..errors import BadInput, explain_mismatch
from ..kernels._launch import Launch


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The machine code of one Launch for one architecture.

    name             the kernel's symbol
    arch             the Device's arch
    launch           what was compiled
    asm              text by stage: ttir or gluon's ttgir, llir, amdgcn or ptx
    binary           the code object: hsaco or cubin
    warps, lanes     warps of one program, lanes of a warp
    shared_bytes     LDS or shared memory of one program
    registers        vector registers of a lane (on CDNA with its accumulation registers)
    scalar_registers scalar registers of a wave, 0 on NVIDIA
    spills           32-bit vector and scalar registers spilled on AMD; words of local memory a thread uses on NVIDIA
    scratch_bytes    scratch or local memory of a lane
    """

    name: str
    arch: str
    launch: Launch
    asm: Mapping[str, str]
    binary: bytes
    warps: int
    lanes: int
    shared_bytes: int
    registers: int
    scalar_registers: int
    spills: int
    scratch_bytes: int

    @property
    def machine_code(self) -> str:
        """The assembly a person reads: amdgcn, or SASS as nvdisasm prints it."""
        return self.asm["amdgcn"] if "amdgcn" in self.asm else _sass(self.binary)

    @property
    def serialised_wgmma(self) -> bool:
        """Whether ptxas had to serialise asynchronous wgmma (its warnings C7510 to C7515): tensor cores then wait."""
        ptx = self.asm.get("ptx", "")
        return "wgmma.mma_async" in ptx and "instructions are serialized" in _ptxas_log(ptx, self.arch)


def gpu_target(device: Device) -> GPUTarget:
    """Triton's name of a device. Raises BadInput for a CPU."""
    if device.arch.startswith("gfx"):
        return GPUTarget("hip", device.arch, 64 if device.family == "gfx9" else 32)
    if device.arch.startswith("sm"):
        return GPUTarget("cuda", int(device.arch[2:]), 32)
    raise BadInput(explain_mismatch("device", got=device.arch, wanted="a GPU (gfx... or sm..)", then="Name another."))


def compiled_kernel(launch: Launch, device: Device) -> Any:
    """Triton's own record of one launch, compiled for `device` or found in its cache, as a call there would find it.

    Tensors may be meta, and then count as aligned to 16 bytes.
    """
    target = gpu_target(device)
    backend = make_backend(target)
    fn = launch.fn
    assert [*launch.args, *launch.constants] == fn.arg_names  # what a launch passes by place
    # JITFunction.run, less the driver
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    given = {"debug": False, **launch.options}
    bound, specialization, _ = bind(*launch.args.values(), **launch.constants, **given)
    options, signature, constants, attributes = fn._pack_args(backend, given, bound, specialization, None)
    settle_key(fn)
    source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def compile_launch(launch: Launch, device: Device) -> Compiled:
    """Compiles one launch for `device`; its tensors may be meta, as for `compiled_kernel`."""
    target, kernel = gpu_target(device), compiled_kernel(launch, device)
    binary = kernel.asm[make_backend(target).binary_ext]
    read = _amd_resources if target.backend == "hip" else _nvidia_resources
    return Compiled(
        name=kernel.metadata.name,
        arch=device.arch,
        launch=launch,
        asm={stage: text for stage, text in kernel.asm.items() if isinstance(text, str)},
        binary=binary,
        warps=kernel.metadata.num_warps,
        lanes=target.warp_size,
        shared_bytes=kernel.metadata.shared,
        **read(kernel.asm.get("amdgcn", ""), binary),
    )


def _amd_resources(text: str, binary: bytes) -> dict[str, int]:
    """From the metadata that the assembly carries."""
    vgprs, sgprs, vgpr_spills, sgpr_spills, scratch = (
        int(_only(rf"^\s+\.{key}:\s+(\d+)$", text))
        for key in ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    return {
        "registers": vgprs,
        "scalar_registers": sgprs,
        "spills": vgpr_spills + sgpr_spills,
        "scratch_bytes": scratch,
    }


def _nvidia_resources(_: str, binary: bytes) -> dict[str, int]:
    """From the code object, through cuobjdump. STACK is what Triton itself calls spills: local memory of a thread."""
    text = _tool("cuobjdump", binary, "--dump-resource-usage")
    registers, stack, local = (int(_only(rf"\b{key}:(\d+)", text)) for key in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "scalar_registers": 0,
        "spills": (stack + local) // 4,
        "scratch_bytes": stack + local,
    }


def _only(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text, re.MULTILINE)
    return str(found)


@functools.lru_cache(maxsize=64)
def _sass(cubin: bytes) -> str:
    return _tool("nvdisasm", cubin, "--print-code")


@functools.lru_cache(maxsize=64)
def _ptxas_log(ptx: str, arch: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    capability = int(arch[2:])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", str(source)]
        done = subprocess.run([*command, "-o", str(Path(folder, "kernel.cubin"))], capture_output=True, text=True)
    done.check_returncode()
    return done.stderr


def _tool(name: str, cubin: bytes, flag: str) -> str:
    """What a tool of the CUDA toolkit that Triton's wheel carries prints of a code object."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([getattr(knobs.nvidia, name).path, flag, file.name], capture_output=True, text=True)
    done.check_returncode()
    return done.stdout
