"""The loops of a listing, through its control-flow graph, and which of them is hot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .listing import Instruction, Listing


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A natural loop: its instructions in the order of the listing."""

    instructions: tuple[Instruction, ...]

    def contains(self, other: Loop) -> bool:
        return set(map(id, other.instructions)) < set(map(id, self.instructions))


def hot_loop(listing: Listing, is_matrix: Callable[[str], bool]) -> Loop | None:
    """The innermost loop with matrix instructions (of several, the one with most), else the longest innermost loop.

    None when the kernel has no loop.
    """

    def matrix(loop: Loop) -> int:
        return sum(is_matrix(i.opcode) for i in loop.instructions)

    loops = find_loops(listing)
    candidates = [loop for loop in loops if matrix(loop)] or loops
    innermost = [loop for loop in candidates if not any(loop.contains(other) for other in candidates)]
    return max(innermost, key=lambda loop: (matrix(loop), len(loop.instructions)), default=None)


def find_loops(listing: Listing) -> list[Loop]:
    """Every natural loop; back edges to one header make one loop."""
    starts, successors = _blocks(listing)
    reachable, dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    for block in reachable:
        for header in successors[block]:
            if dominators[block] >> header & 1:
                bodies.setdefault(header, {header}).update(_body(block, header, successors, reachable))
    ends = [*starts[1:], len(listing.instructions)]
    return [
        Loop(instructions=tuple(i for b in sorted(body) for i in listing.instructions[starts[b] : ends[b]]))
        for body in bodies.values()
    ]


def _blocks(listing: Listing) -> tuple[list[int], list[list[int]]]:
    """The first instruction of each basic block, and the blocks that may follow each."""
    code = listing.instructions
    after = {n + 1 for n, i in enumerate(code) if i.targets or not i.falls}
    starts = sorted(n for n in {0, *after, *listing.labels.values()} if n < len(code))
    block_at = {start: n for n, start in enumerate(starts)}
    successors: list[list[int]] = []
    for n, end in enumerate([*starts[1:], len(code)]):
        last = code[end - 1]
        follow = [n + 1] if last.falls and n + 1 < len(starts) else []
        follow += [block_at[listing.labels[label]] for label in last.targets if listing.labels[label] in block_at]
        successors.append(follow)
    return starts, successors


def _dominators(successors: list[list[int]]) -> tuple[list[int], list[int]]:
    """The blocks reachable from the first, and each block's dominators as a bit set."""
    order, seen = [0], {0}
    for block in order:
        fresh = [b for b in successors[block] if b not in seen]
        seen.update(fresh)
        order += dict.fromkeys(fresh)
    everything = (1 << len(successors)) - 1
    dominators = [everything] * len(successors)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in order:
            for follower in successors[block]:
                narrowed = dominators[follower] & (dominators[block] | 1 << follower)
                changed |= narrowed != dominators[follower]
                dominators[follower] = narrowed
    return order, dominators


def _body(tail: int, header: int, successors: list[list[int]], reachable: list[int]) -> set[int]:
    """The blocks from which `tail` is reached without passing `header`."""
    predecessors: dict[int, list[int]] = {}
    for block in reachable:
        for follower in successors[block]:
            predecessors.setdefault(follower, []).append(block)
    body, stack = {header}, [tail]
    while stack:
        block = stack.pop()
        if block not in body:
            body.add(block)
            stack += predecessors.get(block, [])
    return body
