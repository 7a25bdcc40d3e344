"""FLOPs and bytes of a Problem, and the shortest time a device could take for it."""

from __future__ import annotations

from ..device import Device
from ..problem import Problem

ACT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def flops(problem: Problem) -> int:
    """Multiplications and additions of y[M, N] = x @ W^T."""
    return 2 * problem.m * problem.n * problem.k


def weight_bytes(problem: Problem) -> int:
    """Codes, scales and 4-bit zero points of one weight."""
    groups = problem.n * problem.k // problem.group
    zeros = groups // 2 if problem.has_zeros else 0
    return problem.n * problem.k // 2 + groups * ACT_BYTES[problem.act] + zeros


def bytes_moved(problem: Problem) -> int:
    """The fewest bytes through memory: the weight and x read once, y written once."""
    return weight_bytes(problem) + ACT_BYTES[problem.act] * problem.m * (problem.k + problem.n)


def bound_seconds(problem: Problem, device: Device) -> float:
    """The larger of the time the bytes need and the time the FLOPs need; 0 on a device of unknown peaks."""
    if not device.matrix_flops:
        return 0.0
    return max(bytes_moved(problem) / device.memory_bytes_per_s, flops(problem) / device.matrix_flops)
