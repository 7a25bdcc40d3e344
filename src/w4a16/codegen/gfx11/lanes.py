"""Instructions that move values between lanes, and the DPP form of any vector instruction."""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .operands import bits
from .program import Instruction, dpp_lanes
from .state import Gang
from .table import Step, define, destination

U32 = np.uint32
LANE = np.arange(32)


@define("v_readfirstlane_b32")
def _read_first(i: Instruction) -> Step:
    source, into = bits(i.operands[1]), i.operands[0].index

    def step(gang: Gang) -> None:
        first = gang.active.argmax(1)[:, None]
        gang.write_scalar(into, np.take_along_axis(np.broadcast_to(source(gang), gang.active.shape), first, 1))

    return step


@define("v_readlane_b32")
def _read_lane(i: Instruction) -> Step:
    source, lane, into = i.operands[1].index, bits(i.operands[2]), i.operands[0].index

    def step(gang: Gang) -> None:
        at = np.broadcast_to(lane(gang) & U32(31), (gang.count, 1)).astype(np.int64)
        gang.write_scalar(into, np.take_along_axis(gang.v[source], at, 1))

    return step


@define("v_writelane_b32")
def _write_lane(i: Instruction) -> Step:
    source, lane, into = bits(i.operands[1]), bits(i.operands[2]), destination(i)

    def step(gang: Gang) -> None:
        at = np.broadcast_to(lane(gang) & U32(31), (gang.count, 1)).astype(np.int64)
        np.put_along_axis(gang.v[into], at, np.broadcast_to(source(gang), (gang.count, 1)), 1)

    return step


@define("v_permlane16_b32", "v_permlanex16_b32")
def _permute_row(i: Instruction) -> Step:
    """Lane selectors of four bits in two SGPRs; the x form reads the other row of 16."""
    source, low, high, into = i.operands[1].index, bits(i.operands[2]), bits(i.operands[3]), destination(i)
    row = LANE & 16 ^ (16 if i.mnemonic == "v_permlanex16_b32" else 0)

    def step(gang: Gang) -> None:
        selectors = np.where(LANE & 8, high(gang), low(gang)) >> (LANE % 8 * 4).astype(U32) & U32(15)
        lanes = np.broadcast_to(row | selectors.astype(np.int64), gang.active.shape)
        if not np.take_along_axis(gang.active, lanes, 1)[gang.active].all():
            raise Fault("a lane reads an inactive lane")
        gang.write(into, np.take_along_axis(gang.v[source], lanes, 1))

    return step


@define("v_swap_b32")
def _swap(i: Instruction) -> Step:
    first, second = (operand.index for operand in i.operands)

    def step(gang: Gang) -> None:
        old = gang.v[first].copy()
        gang.write(first, gang.v[second].copy())
        gang.write(second, old)

    return step


def with_dpp(i: Instruction, plain: Step) -> Step:
    """Lanes whose source cannot be read keep their result, or with bound_ctrl read 0."""
    source, exists, writable = dpp_lanes(i)
    fetch_inactive, zero = bool(i.modifiers.get("fi")), bool(i.modifiers.get("bound_ctrl"))

    def step(gang: Gang) -> None:
        active = gang.active
        gang.readable = exists & (active[:, source] | fetch_inactive)
        gang.set_active(active & writable & (gang.readable | zero))
        plain(gang)
        gang.set_active(active)

    return step
