"""route: which rows of which expert each block of an expert GEMM computes, on the device, by one small kernel or two.

A program ranks a chunk of the slots for some experts, in their order, so that equal ids route alike every time. A few
slots are one chunk, and every program counts them for itself; many are counted by a launch before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..errors import BadInput, explain_mismatch
from ..moe.route import Route, most_blocks
from ._launch import Launch

OWN = 4  # experts of a program: their ranks are the 16-bit fields of one sum
FEWEST_AT_ONCE, MOST_AT_ONCE = 256, 2048  # slots that a program ranks without counting them first
CHUNK, MOST_CHUNKS = 1024, 32  # slots of a chunk at least, and chunks, where they are counted first
LONGEST_CHUNK = 1 << 15  # what a field counts; more slots take more chunks
FEWEST_BINS = 64  # at least a bin for each lane of a warp
MOST_COUNTS = 4096  # read at a time
BOX = 32  # rows of a block that a wide kernel computes at a time
GEMMS = 2
MOST_OF_A_KIND = tl.constexpr((1 << 15) - 1)  # blocks with as many boxes of rows
EVERY = tl.constexpr(2)  # blocks of more than one box that come before each block of one
OWNED = 16  # blocks whose expert a program looks up at a time


@dataclass(frozen=True, kw_only=True)
class Turns:
    """In what order the programs of GEMMs take the blocks of a route.

    order  int32 [blocks]: blocks, those with most boxes of BOX rows first, after EVERY of them one of a single box
    taken  int32 [GEMMS]: 0, for each to count what its programs have taken
    """

    order: Tensor
    taken: Tensor

    @classmethod
    def of(cls, topk_ids: Tensor, experts: int, block: int) -> Turns:
        blocks = most_blocks(topk_ids.numel(), experts, block)
        if blocks > MOST_OF_A_KIND.value:
            got, wanted = f"{blocks} blocks of {block} slots", f"at most {MOST_OF_A_KIND.value}"
            raise BadInput(explain_mismatch("topk_ids", got=got, wanted=wanted, then="Call it for fewer tokens."))
        order, taken = (topk_ids.new_empty(size, dtype=torch.int32) for size in (blocks, GEMMS))
        return cls(order=order, taken=taken)


@triton.jit
def _ids(ids_ptr, slot, slots, EXPERTS: tl.constexpr):
    """The experts of some slots; EXPERTS for slots of experts elsewhere, and past the last."""
    ids = tl.load(ids_ptr + slot, mask=slot < slots, other=-1).to(tl.int32)
    return tl.where((ids >= 0) & (ids < EXPERTS), ids, EXPERTS)


@triton.jit(do_not_specialize=["slots"])
def _route_unsorted(
    ids_ptr,  # [slots]
    sorted_ptr,  # [slots] int32
    expert_ptr,  # [slots] int32
    used_ptr,  # [1] int32
    position_ptr,  # [slots] int32
    slots,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Blocks of one slot, in the order of the slots."""
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = _ids(ids_ptr, slot, slots, EXPERTS)
    tl.store(sorted_ptr + slot, slot, mask=slot < slots)
    tl.store(expert_ptr + slot, tl.where(ids < EXPERTS, ids, -1), mask=slot < slots)
    tl.store(position_ptr + slot, tl.where(ids < EXPERTS, slot, -1), mask=slot < slots)
    tl.store(used_ptr, slots)


@triton.jit(do_not_specialize=["slots", "steps"])
def _route_counts(
    counts_ptr,  # [chunks, BINS] int32
    ids_ptr,  # [slots]
    slots,
    steps,  # of STEP slots, a chunk
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many slots of a chunk each expert has."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(0) * steps * STEP + tl.arange(0, STEP)
    counts = tl.zeros((BINS,), tl.int32)
    for step in range(steps):
        ids = _ids(ids_ptr, slot + step * STEP, slots, EXPERTS)
        counts += tl.histogram(ids, BINS, mask=ids < EXPERTS)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["slots", "steps", "blocks"])
def _route(
    sorted_ptr,  # [blocks * BLOCK] int32
    expert_ptr,  # [blocks] int32
    used_ptr,  # [1] int32
    position_ptr,  # [slots] int32
    order_ptr,  # [blocks] int32, or None
    taken_ptr,  # [TAKEN] int32, or None
    ids_ptr,  # [slots]
    counts_ptr,  # [chunks, BINS] int32 of _route_counts; None: one step holds all slots
    slots,
    steps,  # of STEP slots, a chunk of 65535 at most
    blocks,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,  # BLOCK, or the next power of two
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,  # of counts read at a time
    OWNED: tl.constexpr,
    BOX: tl.constexpr,
    TAKEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Ranks one chunk of slots for OWN experts, and finds the experts of some blocks."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = chunk * steps * STEP + tl.arange(0, STEP)
    ids = _ids(ids_ptr, slot, slots, EXPERTS)
    bins = tl.arange(0, BINS)
    before = tl.zeros((BINS,), tl.int32)  # slots of each expert in earlier chunks
    if counts_ptr is None:
        counts = tl.histogram(ids, BINS, mask=ids < EXPERTS)
    else:
        counts = tl.zeros((BINS,), tl.int32)
        for row in range(0, chunks, ROWS):
            rows = (row + tl.arange(0, ROWS))[:, None]
            part = tl.load(counts_ptr + rows * BINS + bins[None, :], mask=rows < chunks, other=0)
            counts += tl.sum(part, 0)
            before += tl.sum(tl.where(rows < chunk, part, 0), 0)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, 0)
    starts = ends - padded

    base = starts + before
    seen = tl.zeros((1,), tl.int64)
    for _ in range(steps):
        own = ids - group * OWN
        mine = (own >= 0) & (own < OWN) & (ids < EXPERTS)
        field = (own & (OWN - 1)).to(tl.int64) * 16
        one = tl.where(mine, tl.full((STEP,), 1, tl.int64) << field, 0)
        rank = ((seen + tl.cumsum(one, 0)) >> field).to(tl.int32) & 0xFFFF
        position = tl.gather(base, tl.minimum(ids, BINS - 1), 0) + rank - 1
        tl.store(sorted_ptr + position, slot, mask=mine)
        tl.store(position_ptr + slot, position, mask=mine)
        if group == 0:
            tl.store(position_ptr + slot, -1, mask=(slot < slots) & (ids == EXPERTS))
        seen += tl.sum(one, 0)
        slot += STEP
        ids = _ids(ids_ptr, slot, slots, EXPERTS)

    filled = starts + counts
    if order_ptr is not None:
        # How many blocks of an expert have one box of rows, two and so on, in fields of one number.
        KINDS: tl.constexpr = BLOCK // BOX
        BITS: tl.constexpr = 64 // KINDS
        wholes = tl.maximum(padded // BLOCK - 1, 0)
        last = tl.maximum(counts - 1, 0) % BLOCK // BOX
        kinds = (wholes.to(tl.int64) << (BITS * (KINDS - 1))) + (tl.full((BINS,), 1, tl.int64) << (BITS * last))
        kinds = tl.where(counts > 0, kinds, 0)
        kinds_before = tl.cumsum(kinds, 0) - kinds
        all_kinds = tl.sum(kinds, 0)
    for first in range((chunk * tl.num_programs(0) + group) * OWNED, blocks, chunks * tl.num_programs(0) * OWNED):
        block = first + tl.arange(0, OWNED)
        owner = tl.sum((ends[None, :] <= (block * BLOCK)[:, None]).to(tl.int32), 1)
        tl.store(expert_ptr + block, tl.where(owner < EXPERTS, owner, -1), mask=block < blocks)
        if order_ptr is not None:
            own = tl.minimum(owner, BINS - 1)
            within = block - tl.gather(starts, own, 0) // BLOCK
            kind = tl.where(within < tl.gather(wholes, own, 0), KINDS - 1, tl.gather(last, own, 0))
            turn = (tl.gather(kinds_before, own, 0) >> (BITS * kind)).to(tl.int32) & MOST_OF_A_KIND
            turn += tl.where(kind == KINDS - 1, within, 0)
            for i in tl.static_range(1, KINDS):
                of_kind = (all_kinds >> (BITS * i)).to(tl.int32) & MOST_OF_A_KIND
                turn += tl.where(kind < i, of_kind, 0)
            if KINDS > 1:  # blocks of one box, bound by memory, among those of more, bound by the matrix units
                narrow = all_kinds.to(tl.int32) & MOST_OF_A_KIND
                wide = tl.sum(padded, 0) // BLOCK - narrow
                among, after = wide // EVERY, turn - wide
                wides = turn + tl.minimum(turn // EVERY, narrow)
                narrows = after + tl.where(after < among, (after + 1) * EVERY, wide)
                turn = tl.where(kind == 0, narrows, wides)
            tl.store(order_ptr + turn, block, mask=(block < blocks) & (owner < EXPERTS))
        empty = tl.where(owner < EXPERTS, tl.gather(filled, tl.minimum(owner, BINS - 1), 0), 0)
        lane = tl.arange(0, ROOM)[None, :]
        at = block[:, None] * BLOCK + lane
        unfilled = (block < blocks)[:, None] & (lane < BLOCK) & (at >= empty[:, None])
        tl.store(sorted_ptr + at, slots, mask=unfilled)
    if (group == 0) & (chunk == 0):
        tl.store(used_ptr, tl.sum(padded, 0))
        if taken_ptr is not None:
            tl.store(taken_ptr + tl.arange(0, TAKEN), 0)


def route_launches(
    topk_ids: Tensor, experts: int, block: int, pdl: bool = False, turns: Turns | None = None
) -> tuple[Route, tuple[Launch, ...]]:
    """The route of topk_ids [tokens, top_k] in blocks of `block` slots, and the launches that fill it, and `turns`.

    pdl  Hopper: the launches wait for the kernel before them on the device, and let the next one start
    """
    ids = topk_ids.contiguous()
    slots = ids.numel()
    blocks = most_blocks(slots, experts, block)
    sorted_ids, expert_ids, used, position = (
        ids.new_empty(size, dtype=torch.int32) for size in (blocks * block, blocks, 1, slots)
    )
    routing = Route(
        block=block,
        sorted_token_ids=sorted_ids,
        expert_ids=expert_ids,
        num_tokens_post_padded=used,
        position=position,
    )
    outputs = {"sorted_ptr": sorted_ids, "expert_ptr": expert_ids, "used_ptr": used, "position_ptr": position}
    if block == 1:
        size = min(triton.next_power_of_2(slots), 1024)
        unsorted = Launch(
            fn=_route_unsorted,
            grid=(triton.cdiv(slots, size),),
            args={"ids_ptr": ids, **outputs, "slots": slots},
            constants={"EXPERTS": experts, "CHUNK": size},
            options={"num_warps": 4},
        )
        return routing, (unsorted,)
    bins = max(FEWEST_BINS, triton.next_power_of_2(experts))
    chunks = 1
    if slots > MOST_AT_ONCE:
        chunks = max(min(triton.cdiv(slots, CHUNK), MOST_CHUNKS), triton.cdiv(slots, LONGEST_CHUNK))
    step = CHUNK if chunks > 1 else max(FEWEST_AT_ONCE, triton.next_power_of_2(slots))
    steps = triton.cdiv(slots, chunks * step)
    options = {"num_warps": max(4, step // 256)} | ({"launch_pdl": True} if pdl else {})
    sizes = {"EXPERTS": experts, "BINS": bins}
    first: tuple[Launch, ...] = ()
    counts = None
    if chunks > 1:
        counts = ids.new_empty((chunks, bins), dtype=torch.int32)
        args = {"counts_ptr": counts, "ids_ptr": ids, "slots": slots, "steps": steps}
        constants = {**sizes, "STEP": step, "PDL": pdl}
        first = (Launch(fn=_route_counts, grid=(chunks,), args=args, constants=constants, options=options),)
    taking = {"order_ptr": turns.order, "taken_ptr": turns.taken} if turns else {"order_ptr": None, "taken_ptr": None}
    args = {**outputs, **taking, "ids_ptr": ids, "counts_ptr": counts, "slots": slots, "steps": steps, "blocks": blocks}
    constants = {
        **sizes,
        "BLOCK": block,
        "ROOM": triton.next_power_of_2(block),
        "OWN": OWN,
        "STEP": step,
        "ROWS": max(1, MOST_COUNTS // bins),
        "OWNED": OWNED,
        "BOX": BOX,
        "TAKEN": turns.taken.numel() if turns else 0,
        "PDL": pdl,
    }
    grid = (triton.cdiv(experts, OWN), chunks)
    return routing, (*first, Launch(fn=_route, grid=grid, args=args, constants=constants, options=options))
