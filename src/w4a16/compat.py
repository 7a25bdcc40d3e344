"""Every difference between Triton versions, and between its compilers and its interpreter, that a kernel would meet.

The interpreters of 3.6, 3.7, 3.8 and 3.9 keep bf16 as 16-bit integers: they add, multiply and `tl.dot` bit patterns,
cast integers to bf16 as bits, and truncate where the hardware rounds fp32 to it, all without an error. There, and only
there, these helpers go through fp32; compiled, each is the one operation it names.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.runtime import driver, jit

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, 16-bit operands, fp32 sums."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """fp32 or integer `x` as DTYPE, rounded to nearest even."""
    if INTERPRETED and DTYPE.is_bf16():
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(a, b):
    """a * b, rounded to their 16-bit dtype."""
    if INTERPRETED:
        return narrowed(a.to(tl.float32) * b.to(tl.float32), a.dtype)
    return a * b


@triton.jit
def difference(a, b):
    """a - b, rounded to their 16-bit dtype."""
    if INTERPRETED:
        return narrowed(a.to(tl.float32) - b.to(tl.float32), a.dtype)
    return a - b


workgroup_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed after Triton 3.6


@triton.constexpr_function
def wmma_layout(warps_m, warps_n):
    """Gluon's layout of the sums of gfx11's WMMA, lanes along N: `warps_per_cta` in Triton 3.6, then `warp_bases`."""
    from triton.experimental.gluon.language.amd import AMDWMMALayout

    if "warps_per_cta" in AMDWMMALayout.__dataclass_fields__:
        return AMDWMMALayout(version=1, transposed=False, warps_per_cta=[warps_m, warps_n])
    bases = [[0, 1 << bit] for bit in range(warps_n.bit_length() - 1)]
    bases += [[1 << bit, 0] for bit in range(warps_m.bit_length() - 1)]
    return AMDWMMALayout(version=1, transposed=False, warp_bases=bases)


@triton.constexpr_function
def halved_wmma_layout(warps_m, warps_n):
    """wmma_layout of [1, M, N] in a program of 2 * warps_m * warps_n waves: both halves hold the same sums."""
    from triton.experimental.gluon.language.amd import AMDWMMALayout

    if "warps_per_cta" in AMDWMMALayout.__dataclass_fields__:
        return AMDWMMALayout(version=1, transposed=False, warps_per_cta=[2, warps_m, warps_n])
    bases = [[0, 0, 1 << bit] for bit in range(warps_n.bit_length() - 1)]
    bases += [[0, 1 << bit, 0] for bit in range(warps_m.bit_length() - 1)]
    return AMDWMMALayout(version=1, transposed=False, warp_bases=[*bases, [1, 0, 0]], rank=3)


def launcher(kernel: Any, cluster: int) -> Callable[..., None]:
    """A compiled kernel as a function of its grid and its arguments, constants included.

    Triton compiles for the clusters it launches, and then spreads every tensor over them; a kernel whose programs
    share no tensors is compiled for one and launched in clusters: what the launcher reads is (warps, CTAs, shared).
    """
    run, function = kernel.run, kernel.function
    metadata = (
        kernel.packed_metadata if cluster == 1 else (kernel.packed_metadata[0], cluster, kernel.packed_metadata[2])
    )
    device, stream_of = driver.active.get_current_device, driver.active.get_current_stream
    runtime = knobs.runtime

    def launch(grid: tuple[int, ...], *args: Any) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        stream = stream_of(device())
        enter, leave = _hook(runtime.launch_enter_hook), _hook(runtime.launch_exit_hook)
        facts = None if enter is None else kernel.launch_metadata((x, y, z), stream, *args)
        run(x, y, z, stream, function, metadata, facts, enter, leave, *args)

    return launch


@contextmanager
def compiled_anew() -> Iterator[list[str]]:
    """Collects the kernels that Triton compiles inside the `with` because its cache on disk has not got them."""
    names: list[str] = []
    before = knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **facts: Any) -> None:
        if not cache_hit:
            names.append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **facts)

    knobs.compilation.listener = listen
    try:
        yield names
    finally:
        knobs.compilation.listener = before


def build_launcher(kernel: Any) -> None:
    """Puts what launches a compiled kernel here into Triton's cache: in 3.6 C, compiled for each signature."""
    driver.active.launcher_cls(kernel.src, kernel.metadata)


_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# Whether a loop stores a tensor 16 rows at a time: ptxas of Triton 3.9 spills over the addresses of more.
STORES_A_FEW_ROWS = tl.constexpr(_VERSION >= (3, 8))


def told_registers(count: int) -> dict[str, int]:
    """The option by which ptxas orders loads for so many registers; that of Triton 3.7 and later spills then."""
    return {"maxnreg": count} if count and _VERSION < (3, 7) else {}


def settle_key(fn: Any) -> None:
    """Computes a jit function's key in Triton's cache, the same in every process.

    In 3.6 and 3.7 a caller's key takes in its callee's constants only where the callee's key is known by then, so it
    depends on what the process compiled before, and no process finds what another compiled. Later ones do as this.
    """
    finder = jit.DependenciesFinder
    update = finder._update_hash

    def callee_first(self: Any, callee: Any) -> None:
        hash(callee)
        update(self, callee)

    finder._update_hash = callee_first
    try:
        hash(fn)
    finally:
        finder._update_hash = update


def _hook(chain: Any) -> Any:
    """None for a chain without hooks, which Triton keeps from 3.6 on: to call one costs more than all else here."""
    return chain if getattr(chain, "calls", chain) else None


# Asynchronous copies, which Triton 3.9 renames: by pointers, and by TMA of one box each way.
copy_to_shared = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
from_shared = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# Shared memory seen as another shape, a private name to Triton 3.8.
_descriptor = gl.shared_memory_descriptor
reinterpreted = _descriptor.reinterpret if hasattr(_descriptor, "reinterpret") else _descriptor._reinterpret
