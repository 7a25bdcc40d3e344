"""sm90_prefill: x @ W^T on Hopper's warpgroup matrix units, W dequantised in registers on its way to them.

Computes out^T = W @ x^T: wgmma takes its first operand, W, from registers, so that dequantised weights never pass
through shared memory. One warp copies tiles of x and of codes by TMA into a ring; WARPGROUPS warpgroups of 64 rows of W
each dequantise their next tile while wgmma works on the one before. Where there are fewer tiles than SMs, K is split;
`_add_parts` adds the parts in a fixed order. Source of the design: warp-specialised persistent GEMMs as in CUTLASS.
"""

# mypy: disable-error-code="assignment, misc, var-annotated, unreachable"

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..device import current_device, known_device
from ..layouts import PackedWeight
from ..layouts.sm90 import TILE, TILE_WORDS
from ..tuning.sm90_tiles import Sm90PrefillTile
from ._add_parts import addition
from ._launch import Launch, runs
from ._sm90 import aligned, groups_a_tile, let_the_next_kernel_start
from ._sm90_prefill_consumer import consume
from ._sm90_prefill_producer import box_rows, main_rows, produce

BOX_BYTES = 128  # TMA writes to multiples of this in shared memory: zero points of two tiles are read for one
ALIGNMENT = 8  # elements: TMA takes addresses and strides of 16 bytes


@gluon.jit(do_not_specialize=["M"])
def _sm90_prefill(
    out_desc,  # [M, N] in boxes of [main_rows(BLOCK_M), 64]; None where K is split
    rest_desc,  # the same in boxes of the other rows, or None
    x_desc,  # [M, K] in boxes of [main_rows(BLOCK_M), 64]
    box_desc,  # the same in boxes of box_rows(BLOCK_M)
    codes_desc,  # int32 [N/64 * K/64 * 16, 32] in boxes of one tile, layout SM90
    scales_desc,  # [K/G, N_PADDED] in boxes of one tile's groups and rows
    zeros_desc,  # uint8 like scales, or None: every zero point is 8
    bias_ptr,  # [N] or None; with split K _add_parts adds it
    parts_ptr,  # [units, WARPGROUPS, 64 * BLOCK_M] fp32 in the order of _add_parts, or None for one split
    M,
    N,
    K,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    IN_TURN: gl.constexpr,  # warpgroups start their products one after the other
):
    DTYPE: gl.constexpr = x_desc.dtype
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    let_the_next_kernel_start()
    MAIN: gl.constexpr = main_rows(BLOCK_M)
    xs = (gl.allocate_shared_memory(DTYPE, [STAGES, MAIN, 64], x_desc.layout),)
    if BLOCK_M > MAIN:
        xs = xs + (gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M - MAIN, 64], x_desc.layout),)
    else:
        xs = xs + (xs[0],)  # not used
    codes = gl.allocate_shared_memory(gl.int32, [STAGES * WARPGROUPS, 16, 32], codes_desc.layout)
    scales = gl.allocate_shared_memory(DTYPE, [STAGES * WARPGROUPS, GROUPS, 64], scales_desc.layout)
    if zeros_desc is None:
        zeros: gl.constexpr = None
    else:
        zeros = gl.allocate_shared_memory(gl.uint8, [STAGES * WARPGROUPS, GROUPS, 128], zeros_desc.layout)
    outs = xs  # not used where K is split
    if SPLIT == 1:
        outs = (gl.allocate_shared_memory(DTYPE, [WARPGROUPS, MAIN, 64], out_desc.layout), outs[1])
        if BLOCK_M > MAIN:
            outs = (outs[0], gl.allocate_shared_memory(DTYPE, [WARPGROUPS, BLOCK_M - MAIN, 64], rest_desc.layout))
    out_descs = (out_desc, rest_desc)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    turns = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    C: gl.constexpr = CONSUMER_REGISTERS
    P: gl.constexpr = PRODUCER_REGISTERS
    ring = (xs, codes, scales, full, empty, turns)
    sizes = (M, N, K)
    # fmt: off
    if WARPGROUPS == 1:
        gl.warp_specialize([
            (consume, (0, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (produce, (x_desc, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES)),
        ], [1], [P])
    elif WARPGROUPS == 2:
        gl.warp_specialize([
            (consume, (0, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (consume, (1, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (produce, (x_desc, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES)),
        ], [4, 1], [C, P])
    else:
        gl.warp_specialize([
            (consume, (0, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (consume, (1, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (consume, (2, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES, IN_TURN)),
            (produce, (x_desc, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, STAGES)),
        ], [4, 4, 1], [C, C, P])
    # fmt: on


def plan(
    *, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: Sm90PrefillTile
) -> tuple[Launch, ...]:
    """The launches of out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    m, n, k = x.shape[0], weight.n, weight.k
    x = aligned(x, ALIGNMENT)
    blocks_k, rows = triton.cdiv(k, tile.block_k), TILE * tile.warpgroups
    split = triton.cdiv(blocks_k, triton.cdiv(blocks_k, tile.split_k))  # every part has some
    units = triton.cdiv(m, tile.block_m) * triton.cdiv(n, rows) * split
    parts = out.new_empty((units, rows, tile.block_m), dtype=torch.float32) if split > 1 else None
    group = blocks_k * tile.block_k if weight.group == k else weight.group
    codes = weight.codes.view(-1, TILE_WORDS // 16)
    box = gl.NVMMASharedLayout.get_default_for([8, TILE], _GLUON[out.dtype])
    main, whole = main_rows(tile.block_m), split == 1
    rest = tile.block_m - main
    args = {
        "out_desc": TensorDescriptor.from_tensor(out, [main, TILE], box) if whole else None,
        "rest_desc": TensorDescriptor.from_tensor(out, [rest, TILE], box) if whole and rest else None,
        "x_desc": TensorDescriptor.from_tensor(x, [main, TILE], box),
        "box_desc": TensorDescriptor.from_tensor(x, [box_rows(tile.block_m), TILE], box),
        "codes_desc": TensorDescriptor.from_tensor(codes, [16, TILE_WORDS // 16], gl.NVMMASharedLayout(128, 32, 2)),
        "scales_desc": _row_desc(weight.scales, group),
        "zeros_desc": None if weight.zeros is None else _row_desc(weight.zeros, group),
        "bias_ptr": bias if whole else None,
        "parts_ptr": parts,
        "M": m,
        "N": n,
        "K": k,
    }
    consumer, producer, most = registers(tile)
    constants = {
        "GROUP": group,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "WARPGROUPS": tile.warpgroups,
        "SPLIT": split,
        "STAGES": tile.stages,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
        "IN_TURN": tile.in_turn,
    }
    options = {"num_warps": 4, "launch_pdl": True} | ({"maxnreg": most} if tile.registers else {})
    sms = (current_device(x.device) if x.is_cuda else known_device("sm90")).compute_units
    grid = (min(units, sms * tile.residents),)
    gemm = Launch(fn=_sm90_prefill, grid=grid, args=args, constants=constants, options=options)
    return (gemm,) if parts is None else (gemm, addition(out, parts, bias, m, n, split, rows, tile.block_m))


def _row_desc(grid: Tensor, group: int) -> TensorDescriptor:
    """Scales or zero points in boxes of one tile."""
    box = [groups_a_tile(group), max(TILE, BOX_BYTES // grid.itemsize)]
    return TensorDescriptor(
        grid, list(grid.shape), [grid.shape[1], 1], box, gl.NVMMASharedLayout(0, 8 * grid.itemsize, 2)
    )


_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def registers(tile: Sm90PrefillTile) -> tuple[int, int, int]:
    """Registers a thread of consumers, of the producer, and at the start: those of the tile, or all that an SM has."""
    groups = tile.warpgroups + 1
    most = tile.registers or min(65536 // (128 * groups * tile.residents) // 8 * 8, 232)
    # With 152, not 160, ptxas of Triton 3.9 serialises wgmma where three warpgroups keep sums of 192 columns.
    producer = 24 if most <= 80 else 32 if tile.warpgroups == 3 and tile.block_m == 192 else 40
    consumer = min((most * groups - producer) // tile.warpgroups // 8 * 8, 232)
    return consumer, producer, most


sm90_prefill = runs(plan)
