"""Which rows of which expert each block of an expert GEMM computes.

Without a sync; every shape follows from (tokens, top_k, experts, block), so a CUDA graph can hold it. On a GPU by the
kernel of kernels/route.py, elsewhere by torch ops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MATRIX_ROWS = 16  # of one matrix instruction: a smaller block costs the same
DECODE_TOKENS = 5  # up to here, sorting takes longer than reading an expert twice


@dataclass(frozen=True, kw_only=True)
class Route:
    """Blocks of slots, each block of one expert; slot token * top_k + i is choice i of a token.

    sorted_token_ids       int32 [blocks * block]: slots by expert, in order; padding is tokens * top_k
    expert_ids             int32 [blocks]: a block's expert, -1 for a block that has no work
    num_tokens_post_padded int32 [1]: entries of sorted_token_ids in use
    position               int32 [tokens * top_k]: where a slot stands in sorted_token_ids, -1 where it does not
    """

    block: int
    sorted_token_ids: Tensor
    expert_ids: Tensor
    num_tokens_post_padded: Tensor
    position: Tensor


def choose_block(tokens: int, top_k: int, experts: int, largest: int) -> int:
    """Slots a block: 1 for a few tokens that share few experts, else the average load, 16 to `largest`."""
    slots = tokens * top_k
    if tokens == 1 or (tokens <= DECODE_TOKENS and slots < 2 * experts):
        return 1
    load = -(-slots // experts)
    return max(MATRIX_ROWS, min(1 << (load - 1).bit_length(), largest))


def route(topk_ids: Tensor, experts: int, block: int) -> Route:
    """The blocks of topk_ids [tokens, top_k]; ids outside 0..experts-1 are in none."""
    if topk_ids.is_cuda:
        from ..kernels.route import route_launches  # Triton is no dependency on a CPU

        routing, launches = route_launches(topk_ids, experts, block)
        for launch in launches:
            launch.run()
        return routing
    return _unsorted(topk_ids, experts) if block == 1 else moe_align_block_size(topk_ids, experts, block)


def most_blocks(slots: int, experts: int, block: int) -> int:
    """Blocks that any routing fits in: at most min(experts, slots) experts have slots, each with less than a block of
    padding."""
    return -(-(slots + min(experts, slots) * (block - 1)) // block)


def _unsorted(topk_ids: Tensor, experts: int) -> Route:
    """Blocks of one slot, in the order of the slots."""
    ids = topk_ids.flatten()
    slots = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    served = (ids >= 0) & (ids < experts)
    return Route(
        block=1,
        sorted_token_ids=slots,
        expert_ids=torch.where(served, ids, -1).to(torch.int32),
        num_tokens_post_padded=torch.full((1,), ids.numel(), dtype=torch.int32, device=ids.device),
        position=torch.where(served, slots, -1),
    )


def moe_align_block_size(topk_ids: Tensor, experts: int, block: int) -> Route:
    """Slots sorted by expert (stable), each expert padded to whole blocks."""
    ids = topk_ids.flatten().long()
    slots, device = ids.numel(), ids.device
    key, order = torch.where((ids >= 0) & (ids < experts), ids, experts).sort(stable=True)
    first = torch.searchsorted(key, torch.arange(experts + 1, device=device))
    counts = first.diff()
    padded = (counts + block - 1) // block * block
    ends = padded.cumsum(0)

    blocks = most_blocks(slots, experts, block)
    position = torch.arange(blocks * block, device=device)
    owner = torch.searchsorted(ends, position, right=True)  # past the last end: experts, which has no slots
    expert = owner.clamp(max=experts - 1)
    within = position - (ends - padded)[expert]
    used = (owner < experts) & (within < counts[expert])
    slot = order[(first[expert] + within).clamp(max=slots - 1)]
    entry = torch.arange(slots, device=device)  # of `order`
    owned = key.clamp(max=experts - 1)
    stands = torch.where(key < experts, (ends - padded - first[:-1])[owned] + entry, -1)
    return Route(
        block=block,
        sorted_token_ids=torch.where(used, slot, slots).to(torch.int32),
        expert_ids=torch.where(owner < experts, owner, -1)[::block].to(torch.int32).contiguous(),
        num_tokens_post_padded=ends[-1:].to(torch.int32),
        position=torch.empty_like(stands).scatter_(0, order, stands).to(torch.int32),
    )
