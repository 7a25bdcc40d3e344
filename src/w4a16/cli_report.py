"""`w4a16 report`: what a model keeps in memory when it is loaded."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    model: Annotated[str, typer.Argument(help="A checkpoint folder or a Hugging Face Hub id.")],
    device: Annotated[str, typer.Option(help="Where the model is loaded: cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Activations: auto (the model's), bfloat16, float16 or float32.")] = "auto",
    dense_cache: Annotated[str, typer.Option(help="Dense copies for prefill: off, soft or hard.")] = "soft",
    memory_utilization: Annotated[float, typer.Option(help="The share of the memory that may be filled.")] = 0.9,
) -> None:
    """Load MODEL and list its weights: bytes packed, dense copies, and why there are none."""
    from .api import load

    loaded = load(model, device, dtype=dtype, dense_cache=dense_cache, memory_utilization=memory_utilization)
    print(loaded.w4a16_report())
