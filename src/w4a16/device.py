"""Device: what a kernel's choice needs to know of a machine, as data. The only probe of hardware in the package."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from .errors import BadInput, OverBudget, Unsupported, explain_mismatch


@dataclass(frozen=True, kw_only=True)
class Device:
    """One machine.

    arch          `cpu`, a gfx name or smXX
    compute_units CUs of an AMD GPU, SMs of an NVIDIA GPU, cores of a CPU
    shared_bytes  LDS or shared memory one workgroup may use; for a CPU the L2 cache of one core
    registers     32-bit vector registers one thread or lane may use
    matrix_flops  peak dense bf16 FLOP/s of the matrix units, 0 where it depends on the machine
    memory_bytes_per_s  peak of the main memory, 0 where it depends on the machine
    model         the product the figures are of
    flops_by_dtype  (activation dtype, FLOP/s) of the matrix units where they were measured
    product       one that has figures and tuning rows beside those of its architecture, such as `h200`; else ""
    """

    arch: str
    compute_units: int
    shared_bytes: int
    registers: int
    matrix_flops: float
    memory_bytes_per_s: float
    model: str
    flops_by_dtype: tuple[tuple[str, float], ...] = ()
    product: str = ""

    @property
    def name(self) -> str:
        """What the device is called by: its architecture, or the product that differs from the first of that."""
        return self.product or self.arch

    def flops_of(self, act: str) -> float:
        """Peak FLOP/s of products in that dtype; that of bf16 where it was not measured."""
        return dict(self.flops_by_dtype).get(act, self.matrix_flops)

    @property
    def type(self) -> str:
        """torch's device type."""
        return "cpu" if self.arch == "cpu" else "cuda"

    @property
    def family(self) -> str:
        """`cpu`, or the prefix that names a GPU generation: gfx11, gfx12, gfx9, sm8, sm9, sm10."""
        return self.arch if self.arch == "cpu" else self.arch[:-2] if self.arch.startswith("gfx") else self.arch[:-1]


def _known(arch: str, units: int, shared_kib: int, registers: int, tflops: float, gb_s: float, model: str) -> Device:
    return Device(
        arch=arch,
        compute_units=units,
        shared_bytes=shared_kib * 1024,
        registers=registers,
        matrix_flops=tflops * 1e12,
        memory_bytes_per_s=gb_s * 1e9,
        model=model,
    )


# Vendors' published peaks of one product of each architecture, and of products with tuning rows of their own.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _known("cpu", 1, 512, 16, 0, 0, "any x86-64 or Arm CPU"),
        _known("gfx1100", 96, 64, 256, 122.8, 960, "Radeon RX 7900 XTX"),
        _known("gfx1101", 60, 64, 256, 74.6, 624, "Radeon RX 7800 XT"),
        _known("gfx1150", 16, 64, 256, 23.8, 120, "Radeon 890M"),
        _known("gfx1151", 40, 64, 256, 59.4, 256, "Radeon 8060S (Strix Halo)"),
        _known("gfx1201", 64, 64, 256, 195, 640, "Radeon RX 9070 XT"),
        _known("gfx942", 304, 64, 512, 1307, 5300, "Instinct MI300X"),
        _known("sm80", 108, 163, 255, 312, 2039, "A100 80GB SXM"),
        _known("sm86", 84, 99, 255, 142, 936, "GeForce RTX 3090"),
        _known("sm89", 128, 99, 255, 330, 1008, "GeForce RTX 4090"),
        _known("sm90", 132, 227, 255, 989, 3350, "H100 SXM"),
        replace(_known("sm90", 132, 227, 255, 989, 4800, "H200 SXM"), product="h200"),
        _known("sm100", 148, 227, 255, 2250, 8000, "B200"),
    )
}


@functools.cache
def installed(module: str) -> bool:
    """Whether an optional Python module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def known_device(arch: str) -> Device:
    """The device of that architecture or product; an unlisted architecture takes the figures of the first of its
    family, under its name.

    Raises BadInput that lists the known names when no family fits.
    """
    if arch in DEVICES:
        return DEVICES[arch]
    for device in DEVICES.values():
        if re.fullmatch(rf"{device.family}[0-9a-f]{{1,2}}", arch):
            return replace(device, arch=arch, model=f"unlisted; figures of {device.arch}")
    then = "Name one of these, or another of their families."
    raise BadInput(explain_mismatch("device", got=arch, wanted=", ".join(DEVICES), then=then))


@functools.cache
def _probe(kind: str, index: int | None) -> Device:
    if kind == "cpu":
        return DEVICES["cpu"]
    if kind != "cuda":
        raise Unsupported(f"w4a16 runs on cpu and cuda (NVIDIA and AMD) devices, not on {kind!r}.")
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    if torch.version.hip:
        return known_device(properties.gcnArchName.split(":")[0])
    return of_product(known_device(f"sm{properties.major}{properties.minor}"), properties.name)


def of_product(device: Device, gpu: str) -> Device:
    """The device as the product that its driver names, where that one is listed beside its architecture."""
    product = DEVICES.get(product_name(gpu), device)
    return product if product.arch == device.arch else device


def current_device(device: torch.device | str = "cpu") -> Device:
    """The Device behind a torch device. Raises Unsupported or BadInput for one that w4a16 does not know."""
    where = torch.device(device)
    return _probe(where.type, where.index)


def this_machine() -> Device:
    """The Device that a model would be put on here: the GPU if there is one, else the CPU."""
    return current_device("cuda" if torch.cuda.is_available() else "cpu")


def gpu_name() -> str:
    """This machine's GPU as its driver names it; "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def product_name(gpu: str | None = None) -> str:
    """A GPU as one word, such as `h100` or `rx7900xtx`: the named one, else this machine's; `cpu` without one."""
    name = gpu_name() if gpu is None else gpu
    makers = {"nvidia", "amd", "ati", "geforce", "radeon", "instinct", "tesla", "graphics"}
    words = [word for word in re.split(r"[\s-]+", name.lower()) if word not in makers]
    if not any(words):
        return "cpu"
    return words[0] if re.search(r"\d", words[0]) else "".join(words)


def session_facts() -> str:
    """The GPU, its driver, and the versions that made its code: what a measurement has to name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"{gpu}, {toolkit}, torch {torch.__version__}, Triton {importlib.metadata.version('triton')}"


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph: then nothing may wait for it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """A named range for NVIDIA's profilers; nothing elsewhere."""
    if not torch.version.cuda or not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def free_and_total(device: torch.device | str) -> tuple[int, int]:
    """Bytes of memory free right now and in all, where tensors of `device` lie; GPUs without their own read the host's.

    Blocks that torch keeps for later are given back first, so that they count as free.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.get_device_properties(where).is_integrated:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(where)
        return int(free), int(total)
    if not installed("psutil"):
        raise Unsupported(f"the free memory of {where} is not known without psutil: pip install psutil")
    import psutil  # type: ignore[import-untyped]

    host = psutil.virtual_memory()
    return int(host.available), int(host.total)


@contextmanager
def within_memory(what: str, device: torch.device | str) -> Iterator[None]:
    """Turns running out of memory, in whatever words, into one OverBudget with the numbers."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = str(error)
        if type(error) is RuntimeError and "can't allocate memory" not in words:
            raise
        raise OverBudget(
            f"{what}: got out of memory on {device}{_free_words(device)}, wanted room for it. Free some, load a "
            f"smaller model, or split this one with device_map."
        ) from error


def _free_words(device: torch.device | str) -> str:
    try:
        free, total = free_and_total(device)
    except Unsupported:  # without psutil
        return ""
    return f" ({free / 1e9:.1f} GB free of {total / 1e9:.1f} GB)"


def synchronize() -> None:
    """Waits for all work on the current GPU."""
    torch.cuda.synchronize()


class Stopwatch:
    """Seconds of GPU time between `start` and `stop` on the current stream."""

    def __init__(self) -> None:
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._start.record()

    def stop(self) -> float:
        self._stop.record()
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) * 1e-3


class Graph:
    """A captured CUDA graph of `work`, which runs once before, uncaptured, unless the like of it has (`ran`)."""

    def __init__(self, work: Callable[[], object], *, ran: bool = False) -> None:
        if not ran:
            work()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work()

    def replay(self) -> None:
        self._graph.replay()
