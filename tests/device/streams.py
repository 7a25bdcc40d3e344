"""One piece of work again and again, where launches overlap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def on_4_streams(run: Callable[[], Tensor], times: int = 100) -> list[Tensor]:
    """What each call gave, the streams in turn."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for i in range(times):
        with torch.cuda.stream(streams[i % len(streams)]):
            found.append(run())
    torch.cuda.synchronize()
    return found


def from_a_graph(run: Callable[[], Tensor]) -> Tensor:
    """What a replay of the captured work gave."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.cuda.synchronize()
    return found
