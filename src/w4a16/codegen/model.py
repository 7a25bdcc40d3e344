"""Predicts a GEMM's time on RDNA3 from its machine code. docs/gfx11.md holds it against what the sources measured.

seconds = issue + traffic. Issue: the cycles that the fullest SIMD's waves spend on WMMA and VALU, which share a port,
and those in which that port is idle because every wave waits (schedule.py). Traffic: the bytes that programs of one
shader array cannot share in its cache while they run at once, or those of main memory, whichever take longer. They are
added, as loops with barriers measured it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..device import Device
from ..problem import Problem
from .classes import vector_port_cycles
from .compile import Compiled
from .gfx11.lds import Meter
from .isa import hot_paths, listing_of, read_isa
from .listing import Instruction
from .schedule import Walk, port_use, step_of

SIMDS, SHARERS = 4, 2  # of a WGP of two CUs; those of a CU share its LDS
FLOPS_A_CYCLE = 512  # of a CU's matrix units
ARRAY_WGPS = 5  # WGPs of a shader array, which share an L1
# Of the paper's peak, so of its clock: hipBLASLt's 38.6 TFLOP/s of 59.4, fp16 on gfx1151, M=3968 N=19456 K=2560 (#930).
SUSTAINED = 38.6 / 59.4
# From the caches behind L1, to one shader array. Fitted to one measurement: the source's base tile, N=37888 (#879).
ARRAY_BYTES_A_SECOND = 0.296e12


@dataclass(frozen=True, kw_only=True)
class Trip:
    """One wave's cycles in what `Isa` counts of the hot loop: `depth` columns of K; a consumer's and its producer's.

    matrix, vector  on the port that they share
    shared          of LDS, which two SIMDs share; `conflicts` of them because banks are met twice
    outside         on the vector port, once a program
    loaded          bytes asked of global memory
    walks           the same instructions in their order, of each kind of wave
    """

    depth: int
    matrix: int
    vector: int
    shared: float
    conflicts: float
    outside: int
    loaded: int
    walks: tuple[Walk, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of each part, TFLOP/s of the whole, and the part of the issue in which the vector port works."""

    issue: float
    traffic: float
    busy: float
    tflops: float

    @property
    def seconds(self) -> float:
        return self.issue + self.traffic


def read_trip(compiled: Compiled, meter: Meter | None = None) -> Trip:
    """`meter`: of an execution of this very code, for bank conflicts; without it LDS is taken to have none."""
    reading, listing = read_isa(compiled), listing_of(compiled)
    _, paths = hot_paths(compiled, listing)
    place = {id(i): n for n, i in enumerate(listing.instructions)}
    path = [i for path in paths for i in path]
    ideal = {id(i): _shared_bytes(i) * compiled.lanes / 128 for i in path}
    met = ideal if meter is None else {id(i): _met(meter, place[id(i)], i) for i in path}
    hot = Counter(i.opcode for i in {id(i): i for i in path}.values())
    matrix, vector = vector_port_cycles(reading.opcodes, compiled.arch)
    whole = vector_port_cycles(Counter(i.opcode for i in listing.instructions), compiled.arch)
    return Trip(
        depth=reading.weights // compiled.launch.constants["BLOCK_N"],
        matrix=matrix,
        vector=vector,
        shared=sum(met[id(i)] for i in path),
        conflicts=sum(met[id(i)] - ideal[id(i)] for i in path),
        outside=sum(whole) - sum(vector_port_cycles(hot, compiled.arch)),
        loaded=sum(_width(i.opcode) for i in path if _is_load(i.opcode)) * compiled.lanes,
        walks=tuple(tuple(step_of(i, compiled.arch, SHARERS * met[id(i)]) for i in path) for path in paths),
    )


def predict(problem: Problem, device: Device, compiled: Compiled, trip: Trip) -> Prediction:
    """The time of one linear GEMM by this code, launched for `problem`."""
    sizes, reading = compiled.launch.constants, read_isa(compiled)
    blocks_m, blocks_n = -(-problem.m // sizes["BLOCK_M"]), -(-problem.n // sizes["BLOCK_N"])
    wgps, programs = device.compute_units // 2, blocks_m * blocks_n
    clock = SUSTAINED * device.matrix_flops / device.compute_units / FLOPS_A_CYCLE
    fullest = -(-programs * reading.teams // (wgps * SIMDS))  # teams of one SIMD, one after the other
    each = max(1, reading.teams // SIMDS)  # of them of one program
    together = max(1, min(reading.waves // len(trip.walks), fullest) // each)
    busy = port_use(trip.walks, each, together)
    issue = fullest * (problem.k / trip.depth * (trip.matrix + trip.vector) / busy + trip.outside) / clock
    resident = max(1, reading.waves * SIMDS // compiled.warps) * wgps
    arrays = max(1, wgps // ARRAY_WGPS)
    cached = _cache_bytes(problem, sizes, (blocks_m, blocks_n), resident, arrays)
    traffic = max(cached / (arrays * ARRAY_BYTES_A_SECOND), _memory_bytes(problem) / device.memory_bytes_per_s)
    flops = 2 * problem.m * problem.n * problem.k
    return Prediction(issue=issue, traffic=traffic, busy=busy, tflops=flops / (issue + traffic) / 1e12)


def block_of(program: int, blocks_m: int, blocks_n: int, raster: int) -> tuple[int, int]:
    """The blocks of M and N of a program: `raster` blocks of M walk over N together; the source's go down M (0)."""
    band, inside = divmod(program, (raster or blocks_m) * blocks_n)
    tall = min(blocks_m - band * raster, raster or blocks_m)
    return band * raster + inside % tall, inside // tall


def _cache_bytes(problem: Problem, sizes: dict[str, int], blocks: tuple[int, int], resident: int, arrays: int) -> float:
    """What the shader arrays ask for: of the programs that run at once on one of them, each block of x and W once."""
    programs = blocks[0] * blocks[1]
    sample = min(resident, programs)
    asked = 0.0
    for array in range(arrays):
        at = [block_of(program, *blocks, sizes.get("RASTER", 0)) for program in range(array, sample, arrays)]
        asked += len({m for m, _ in at}) * sizes["BLOCK_M"] * 2 + len({n for _, n in at}) * sizes["BLOCK_N"] / 2
    return asked * problem.k * programs / sample


def _memory_bytes(problem: Problem) -> float:
    """Everything once."""
    m, n, k, group = problem.m, problem.n, problem.k, problem.group
    return n * k / 2 + 2 * n * k / group * (1.25 if problem.has_zeros else 1) + 2 * m * k + 2 * m * n


_WIDTHS = {"b8": 1, "u8": 1, "i8": 1, "b16": 2, "u16": 2, "i16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16}


def _width(opcode: str) -> int:
    return next((_WIDTHS[part] for part in reversed(opcode.split("_")) if part in _WIDTHS), 4)


def _is_load(opcode: str) -> bool:
    return opcode.startswith(("buffer_load", "global_load"))


def _shared_bytes(instruction: Instruction) -> int:
    """A lane's, at least a bank's four."""
    if not instruction.opcode.startswith(("ds_load", "ds_store")):
        return 0
    return max(4, _width(instruction.opcode)) * (2 if "2addr" in instruction.opcode else 1)


def _met(meter: Meter, place: int, instruction: Instruction) -> float:
    """Cycles of one wave's execution of an LDS instruction; a paired one is met twice."""
    if not meter.waves[place]:
        return 0.0
    return meter.cycles[place] / meter.waves[place] * (2 if "2addr" in instruction.opcode else 1)
