"""FLOPs and bytes of a Problem, and the shortest time a device could take for it."""

from __future__ import annotations

from dataclasses import dataclass

from ..device import Device
from ..problem import Problem

ACT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the experts of one call had to do.

    slots         (token, expert) pairs that were computed
    touched       distinct experts among them: only their weights are read
    rows          rows of matrix work, the padding of blocks included
    intermediate  columns of the second GEMM's weight [hidden, intermediate], 0 when the call is one GEMM
    """

    slots: int
    touched: int
    rows: int
    intermediate: int = 0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs and bytes that no kernel for the same work can avoid."""

    flops: int
    bytes: int

    def bound(self, device: Device, act: str = "bf16") -> tuple[float, str]:
        """The least seconds on `device` and what binds it, `compute` or `memory`; (0, "") where peaks are unknown."""
        if not device.matrix_flops:
            return 0.0, ""
        compute, memory = self.flops / device.flops_of(act), self.bytes / device.memory_bytes_per_s
        return (compute, "compute") if compute > memory else (memory, "memory")


def uncounted(problem: Problem) -> Routing:
    """The routing of an expert call whose ids were not counted: as many experts as there are slots, if there are."""
    slots = problem.m * problem.top_k
    return Routing(slots=slots, touched=min(slots, problem.experts), rows=slots)


def cost(problem: Problem, routing: Routing | None = None) -> Cost:
    return Cost(flops=flops(problem, routing), bytes=bytes_moved(problem, routing))


def dense_cost(batch: int, m: int, n: int, k: int, element_bytes: int) -> Cost:
    """`batch` products of [M, K] and [K, N], nothing quantised."""
    return Cost(flops=2 * batch * m * n * k, bytes=batch * element_bytes * (m * k + k * n + m * n))


def flops(problem: Problem, routing: Routing | None = None) -> int:
    """Multiplications and additions of y[M, N] = x @ W^T; of an expert call, for its routed slots without padding."""
    if not problem.experts:
        return 2 * problem.m * problem.n * problem.k
    r = routing or uncounted(problem)
    return 2 * r.slots * problem.k * (problem.n + r.intermediate)


def weight_bytes(problem: Problem, routing: Routing | None = None) -> int:
    """Codes, scales and 4-bit zero points of one weight; of an expert call, those of the experts it touched."""
    one = _one_weight(problem, problem.n, problem.k)
    if not problem.experts:
        return one
    r = routing or uncounted(problem)
    return r.touched * (one + (_one_weight(problem, problem.k, r.intermediate) if r.intermediate else 0))


def _one_weight(problem: Problem, n: int, k: int) -> int:
    groups = n * k // min(problem.group, k)
    zeros = groups // 2 if problem.has_zeros else 0
    return n * k // 2 + groups * ACT_BYTES[problem.act] + zeros


def bytes_moved(problem: Problem, routing: Routing | None = None) -> int:
    """The fewest bytes through memory: the weight and x read once, y written once, nothing between two GEMMs."""
    act = ACT_BYTES[problem.act]
    weights = weight_bytes(problem, routing)
    if not problem.experts:
        return weights + act * problem.m * (problem.k + problem.n)
    r = routing or uncounted(problem)
    out = problem.m * problem.k if r.intermediate else r.slots * problem.n
    return weights + act * (problem.m * problem.k + out)


def bound_seconds(problem: Problem, device: Device, routing: Routing | None = None) -> float:
    """The larger of the time the bytes need and the time the FLOPs need; 0 on a device of unknown peaks."""
    return cost(problem, routing).bound(device, problem.act)[0]
