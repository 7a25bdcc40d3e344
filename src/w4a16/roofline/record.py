"""A generation a step at a time: its speed without a profiler, then a trace of it for the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..device import synchronize
from . import scopes
from .trace import WARM_UP


class Generation(Protocol):
    """A model with a prompt: `prefill` makes the first token of every sequence, each `decode` after it one more."""

    def prefill(self) -> None: ...

    def decode(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds to the first token and for each one after it, of `batch` sequences at once."""

    batch: int
    prompt: int
    output: int
    ttft: float
    tpot: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences over the whole time, prompt included."""
        return self.batch * self.output / (self.ttft + (self.output - 1) * self.tpot)

    def sentence(self) -> str:
        return (
            f"batch {self.batch}, prompt {self.prompt}, output {self.output}: TTFT {self.ttft * 1e3:.2f} ms, "
            f"TPOT {self.tpot * 1e3:.3f} ms, {self.tokens_per_s:.1f} tokens/s"
        )


def time_generation(
    generation: Generation, *, batch: int, prompt: int, output: int, where: torch.device, repeats: int = 3
) -> Speed:
    """Medians over `repeats` generations, after one that warms up. Nothing is recorded and no range is opened."""
    first, each = [], []
    for _ in range(1 + repeats):
        started = _now(where)
        generation.prefill()
        middle = _now(where)
        for _ in range(output - 1):
            generation.decode()
        first.append(middle - started)
        each.append((_now(where) - middle) / max(1, output - 1))
    ttft, tpot = statistics.median(first[1:]), statistics.median(each[1:])
    return Speed(batch=batch, prompt=prompt, output=output, ttft=ttft, tpot=tpot)


def _now(where: torch.device) -> float:
    if where.type == "cuda":
        synchronize()
    return time.perf_counter()


def record_generation(
    generation: Generation,
    path: Path,
    *,
    where: torch.device,
    steps: int = 4,
    warm_up: Callable[[], object] | None = None,
    layers: AbstractContextManager[None] | None = None,
) -> None:
    """Writes a trace of one prefill and `steps` decode steps, each in the range of its phase, w4a16's ranges inside.

    warm_up runs first, in a range of its own that no report counts: for a decode step that replays a graph, the same
    step run eagerly, from which the replayed kernels take their problems.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if where.type == "cuda" else [])
    phases: list[tuple[str, Callable[[], object]]] = [("prefill", generation.prefill)]
    phases += [("decode", generation.decode)] * steps
    with scopes.profiling(), layers or nullcontext(), profile(activities=activities, record_shapes=True) as recorded:
        for name, step in [(WARM_UP, warm_up), *phases] if warm_up else phases:
            with record_function(name):
                step()
            _now(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
