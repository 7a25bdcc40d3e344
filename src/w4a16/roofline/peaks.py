"""Peaks: what a machine reached when it was measured, kept as golden/<product>/device.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..device import Device, current_device, product_name
from ..errors import BadInput, explain_mismatch

GOLDEN = Path("golden")  # where `w4a16 golden` keeps its files too


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """One session on one machine.

    machine, session    the product's name as its driver gives it; driver, versions and date
    memory_bytes_per_s  bytes read and written, much larger than the caches, by `copy` (the driver's), `scale` (a kernel
                        that reads and writes) and `read` (a sum); the fastest is the bound
    matrix_flops        FLOP/s of torch.mm by activation dtype
    launch_us           one small kernel in a row of many, by the host's clock; on a CPU one small operator
    round_trip_us       one small kernel and waiting for it
    graph_us            one small kernel in a CUDA graph of many; None on a CPU
    """

    machine: str
    session: str
    memory_bytes_per_s: Mapping[str, float]
    matrix_flops: Mapping[str, float]
    launch_us: float
    round_trip_us: float
    graph_us: float | None


def file_of(product: str, folder: Path = GOLDEN) -> Path:
    return folder / product / "device.json"


def save(peaks: Peaks, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(peaks), indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Peaks | None:
    """The peaks of that file, None where there is no file. Raises BadInput for one that does not hold peaks."""
    if not path.is_file():
        return None
    try:
        peaks = Peaks(**json.loads(path.read_text(encoding="utf-8")))
        if min(*peaks.memory_bytes_per_s.values(), peaks.matrix_flops["bf16"]) > 0:
            return peaks
        got = "a peak of 0"
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        got = f"{type(error).__name__} ({error})"
    then = "Write it again with `w4a16 device --save`."
    raise BadInput(explain_mismatch(str(path), got=got, wanted="measured peaks", then=then))


def measured(device: Device, product: str, folder: Path = GOLDEN) -> Device:
    """`device` with the peaks that were measured on this product, where they are kept; else as it is."""
    path = file_of(product, folder)
    peaks = load(path)
    if peaks is None:
        return device
    return replace(
        device,
        matrix_flops=peaks.matrix_flops["bf16"],
        memory_bytes_per_s=max(peaks.memory_bytes_per_s.values()),
        flops_by_dtype=tuple(sorted(peaks.matrix_flops.items())),
        model=f"{peaks.machine} as measured ({path})",
    )


def measured_here(where: torch.device | str, folder: Path = GOLDEN) -> Device:
    """The device behind a torch device, with measured peaks where they are kept."""
    device = current_device(where)
    return measured(device, product_name() if device.type == "cuda" else "cpu", folder)
