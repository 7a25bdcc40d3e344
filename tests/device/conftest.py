"""These tests need a GPU: `PYTHONPATH=src:tests/cpu python -m pytest tests/device` on a machine that has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))


from w4a16.dispatch import choose, serve_linear


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("missing device: a CUDA or ROCm GPU")
    torch.set_num_threads(1)  # processes side by side, each with threads for all cores, take minutes for seconds
    torch.manual_seed(0)
    choose.cache_clear()
    serve_linear.cache_clear()
