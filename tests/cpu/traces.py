"""Builds traces as torch.profiler exports them, one call at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

H100 = {"id": 0, "name": "NVIDIA H100 80GB HBM3", "computeMajor": 9, "computeMinor": 0, "numSms": 132}


class Recording:
    """A CUDA run: the host launches every 10 us, the device follows `lag` us later, one kernel after another."""

    def __init__(self, lag: float = 100.0) -> None:
        self.events: list[dict[str, Any]] = []
        self.now, self.lag, self.busy_until, self.correlation = 1000.0, lag, 0.0, 0

    def host(self, category: str, name: str, start: float, us: float, thread: int = 1, **arguments: Any) -> None:
        common = {"ph": "X", "pid": 4321, "tid": thread, "ts": start, "dur": us}
        self.events.append({**common, "cat": category, "name": name, "args": arguments})

    def kernel(self, name: str, us: float, *, gap: float = 0.0, launch: bool = True, **more: Any) -> None:
        """Launches now; `more` replaces fields of the kernel's event, `launch=False` leaves the launch out."""
        self.correlation += 1
        if launch:
            self.host("cuda_runtime", "cudaLaunchKernel", self.now, 2.0, correlation=self.correlation)
        start = max(self.now + self.lag, self.busy_until + gap)
        arguments = {"device": 0, "stream": 7, "correlation": self.correlation, "grid": [132, 1, 1]}
        arguments |= more.pop("args", {})
        event = {
            "ph": "X",
            "pid": 0,
            "tid": 7,
            "ts": start,
            "dur": us,
            "cat": "kernel",
            "name": name,
            "args": arguments,
        }
        self.events.append(event | more)
        self.busy_until = start + us
        self.now += 10.0

    def within(self, category: str, name: str, *kernels: tuple[str, float], **arguments: Any) -> None:
        """A host range with kernels (name, us) launched inside it."""
        start = self.now
        self.now += 1.0
        for kernel, us in kernels:
            self.kernel(kernel, us)
        self.host(category, name, start, self.now - start, **arguments)
        self.now += 1.0

    def scope(self, label: str, *kernels: tuple[str, float]) -> None:
        self.within("user_annotation", label, *kernels)

    def operator(
        self,
        name: str,
        dims: list[list[int]],
        *kernels: tuple[str, float],
        types: list[str] | None = None,
        concrete: list[str] | None = None,
    ) -> None:
        arguments = {"Input Dims": dims, "Input type": types or ["c10::BFloat16"] * len(dims)}
        if concrete is not None:
            arguments["Concrete Inputs"] = concrete
        self.within("cpu_op", name, *kernels, **arguments)

    def save(self, path: Path, **header: Any) -> Path:
        top = {"schemaVersion": 1, "deviceProperties": [H100], **header, "traceEvents": self.events}
        path.write_text(json.dumps(top, indent=1))
        return path
