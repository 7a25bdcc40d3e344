"""Times one linear layer on the CPU: w4a16's kernels, torch's dense bf16 and fp32, torch's int4, auto-round if present.

    python benchmarks/cpu_linear.py --json cpu.json

Every provider is checked against fp32 first. Then each round times every provider once, so that all meet the same
machine; weights rotate over copies that do not fit the last cache together. Medians and minima, in milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from w4a16 import layouts, ops  # noqa: F401  (ops registers the operators)
from w4a16.dispatch import launcher
from w4a16.errors import W4A16Error
from w4a16.kernels import cpu_decode
from w4a16.layouts import EXLLAMA, INT4PACK
from w4a16.tuning.tiles import CpuTile
from w4a16.weight import QuantizedWeight, pack_nibbles, unpack_nibbles

Call = Callable[[Tensor, int], Tensor]
BOUND = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 1e-5}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


if __name__ == "__main__":
    pass
