"""sm90_prefill: x @ W^T on Hopper's warpgroup matrix units, W dequantised in registers on its way to them.

Computes out^T = W @ x^T: wgmma takes its first operand, W, from registers, so that dequantised weights never pass
through shared memory. One warp copies tiles of x and of codes by TMA into a ring; WARPGROUPS warpgroups of 64 rows of W
each dequantise their next tiles while wgmma works on those before. Where there are fewer tiles than SMs, K is split:
in two whose programs form a cluster and add up half of the columns each, or in parts that `_add_parts` adds, in a fixed
order. Source of the design: warp-specialised persistent GEMMs as in CUTLASS.
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
from ..layouts.sm90 import TILE, TILE_WORDS, rows_sm90
from ..tuning.sm90_tiles import Sm90PrefillTile
from ._add_parts import addition
from ._launch import Launch, runs
from ._sm90 import aligned, let_the_next_kernel_start
from ._sm90_prefill_consumer import consume
from ._sm90_prefill_producer import box_rows, groups_a_box, produce, product_rows, stand_by, tiles_a_box

BOX_BYTES = 128  # TMA writes to multiples of this in shared memory: zero points of two tiles are read for one
OUT_DESCS = ("out_desc", "second_out_desc", "third_out_desc")
X_DESCS = ("x_desc", "second_x_desc", "third_x_desc")
ALIGNMENT = 8  # elements: TMA takes addresses and strides of 16 bytes


@gluon.constexpr_function
def products(block_m):
    """How many products a block of x takes: one for each bit."""
    return int(block_m).bit_count()


@gluon.jit(do_not_specialize=["M"])
def _sm90_prefill(
    out_desc,  # [M, N] in boxes of the first product's rows (of half of them for a pair) and 64; None for parts
    second_out_desc,  # the same in boxes of the second product's rows, or None
    third_out_desc,  # of the third's, or None
    x_desc,  # [M, K] in boxes of the first product's rows and 64
    second_x_desc,  # the same in boxes of the second product's rows, or None
    third_x_desc,  # of the third's, or None
    box_desc,  # the same in boxes of box_rows(BLOCK_M)
    codes_desc,  # int32 [N/64 * K/64 * 16, 32] in boxes of one step's tiles, layout SM90
    scales_desc,  # [K/G, N_PADDED] in boxes of one tile's groups and rows
    zeros_desc,  # uint8 like scales, or None: every zero point is 8
    bias_ptr,  # [N] or None; _add_parts adds it where it adds the parts
    parts_ptr,  # [units, WARPGROUPS, 64 * BLOCK_M, by a pair half] fp32 in the order of _add_parts; None: K is whole
    M,
    N,
    K,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    SPLIT: gl.constexpr,
    RING: gl.constexpr,  # steps of BLOCK_K on their way
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    PAIRED: gl.constexpr,  # two programs of a cluster add up halves of the block's columns
    IN_TURN: gl.constexpr,  # warpgroups start their products one after the other
):
    DTYPE: gl.constexpr = x_desc.dtype
    PRODUCTS: gl.constexpr = products(BLOCK_M)
    TILES: gl.constexpr = BLOCK_K // 64
    GROUPS: gl.constexpr = groups_a_box(GROUP, TILES)
    BOXES: gl.constexpr = RING * WARPGROUPS * TILES // tiles_a_box(GROUP, TILES)
    let_the_next_kernel_start()
    xs = ()
    for j in gl.static_range(PRODUCTS):
        xs = xs + (gl.allocate_shared_memory(DTYPE, [RING * TILES, product_rows(BLOCK_M, j), 64], x_desc.layout),)
    codes = gl.allocate_shared_memory(gl.int32, [RING * WARPGROUPS, 16 * TILES, 32], codes_desc.layout)
    scales = gl.allocate_shared_memory(DTYPE, [BOXES, GROUPS, 64], scales_desc.layout)
    if zeros_desc is None:
        zeros: gl.constexpr = None
    else:
        zeros = gl.allocate_shared_memory(gl.uint8, [BOXES, GROUPS, 128], zeros_desc.layout)
    out_descs = (out_desc, second_out_desc, third_out_desc)
    x_descs = (x_desc, second_x_desc, third_x_desc)
    outs = xs  # not used where parts are added by the next launch
    if out_desc is not None:
        SHARE: gl.constexpr = 2 if PAIRED else 1
        outs = ()
        for j in gl.static_range(PRODUCTS):
            outs = outs + (
                gl.allocate_shared_memory(DTYPE, [WARPGROUPS, product_rows(BLOCK_M, j) // SHARE, 64], out_desc.layout),
            )
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
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
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, IN_TURN, PAIRED)),
            (produce, (x_descs, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, PAIRED)),
        ] + ([(stand_by, (M,)), (stand_by, (M,))] if PAIRED else []),
            [1, 1, 2] if PAIRED else [1], [P, P, P] if PAIRED else [P])
    elif WARPGROUPS == 2:
        gl.warp_specialize([
            (consume, (0, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, IN_TURN, PAIRED)),
            (consume, (1, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, IN_TURN, PAIRED)),
            (produce, (x_descs, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, PAIRED)),
        ] + ([(stand_by, (M,)), (stand_by, (M,))] if PAIRED else []),
            [4, 1, 1, 2] if PAIRED else [4, 1], [C, P, P, P] if PAIRED else [C, P])
    else:
        gl.warp_specialize([
            (consume, (0, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, IN_TURN, PAIRED)),
            (consume, (1, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, IN_TURN, PAIRED)),
            (consume, (2, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, IN_TURN, PAIRED)),
            (produce, (x_descs, box_desc, codes_desc, scales_desc, zeros_desc, ring, zeros, sizes,
             GROUP, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT, RING, PAIRED)),
        ] + ([(stand_by, (M,)), (stand_by, (M,))] if PAIRED else []),
            [4, 4, 1, 1, 2] if PAIRED else [4, 4, 1], [C, C, P, P, P] if PAIRED else [C, C, P])
    # fmt: on


def plan(
    *, out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: Sm90PrefillTile
) -> tuple[Launch, ...]:
    """The launches of out [M, N] = x [M, K] @ W^T + bias; x already permuted for act-order."""
    x = aligned(x, ALIGNMENT)
    if tile.rest is None:
        return _launches(out, x, weight, bias, tile)
    if tile.first_m:
        m = tile.first_m
        return *_launches(out[:m], x[:m], weight, bias, tile), *_launches(out[m:], x[m:], weight, bias, tile.rest)
    n, last = tile.first_n, weight.n - tile.first_n
    first_bias, last_bias = (None, None) if bias is None else (bias[:n], bias[n:])
    return (
        *_launches(out[:, :n], x, rows_sm90(weight, 0, n), first_bias, tile),
        *_launches(out[:, n:], x, rows_sm90(weight, n, last), last_bias, tile.rest),
    )


def _launches(
    out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: Sm90PrefillTile
) -> tuple[Launch, ...]:
    """One GEMM, and what adds its parts."""
    m, n, k = x.shape[0], weight.n, weight.k
    blocks_k, rows = triton.cdiv(k, tile.block_k), TILE * tile.warpgroups
    split = triton.cdiv(blocks_k, triton.cdiv(blocks_k, tile.split_k))  # every part has some
    units = triton.cdiv(m, tile.block_m) * triton.cdiv(n, rows) * split
    paired = tile.paired and split == 2
    share = tile.block_m // 2 if paired else tile.block_m
    parts = out.new_empty((units, rows, share), dtype=torch.float32) if split > 1 else None
    group = blocks_k * tile.block_k if weight.group == k else weight.group
    groups = groups_a_box(group, tile.block_k // TILE)
    codes = weight.codes.view(-1, TILE_WORDS // 16)
    box = gl.NVMMASharedLayout.get_default_for([8, TILE], _GLUON[out.dtype])
    heights = [product_rows(tile.block_m, j) for j in range(3)]
    outs = [height // 2 if paired else height for height in heights]
    whole = split == 1 or paired
    args = {
        **{name: _box(out, height, box) if whole else None for name, height in zip(OUT_DESCS, outs, strict=True)},
        **{name: _box(x, height, box) for name, height in zip(X_DESCS, heights, strict=True)},
        "box_desc": _box(x, box_rows(tile.block_m), box),
        "codes_desc": TensorDescriptor.from_tensor(
            codes, [tile.block_k // 4, TILE_WORDS // 16], gl.NVMMASharedLayout(128, 32, 2)
        ),
        "scales_desc": _row_desc(weight.scales, groups),
        "zeros_desc": None if weight.zeros is None else _row_desc(weight.zeros, groups),
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
        "RING": tile.stages * TILE // tile.block_k,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
        "PAIRED": paired,
        "IN_TURN": tile.in_turn,
    }
    options = {"num_warps": 4, "launch_pdl": True} | ({"maxnreg": most} if tile.registers else {})
    sms = (current_device(x.device) if x.is_cuda else known_device("sm90")).compute_units
    grid = (min(units, sms * tile.residents),)
    if paired:
        grid = (units // 2,)
    gemm = Launch(
        fn=_sm90_prefill, grid=grid, cluster=2 if paired else 1, args=args, constants=constants, options=options
    )
    return (gemm,) if parts is None or paired else (gemm, addition(out, parts, bias, m, n, split, rows, tile.block_m))


def _box(rows: Tensor, height: int, layout: gl.NVMMASharedLayout) -> TensorDescriptor | None:
    """Rows of x or of the output in boxes of so many, 64 columns wide."""
    return TensorDescriptor.from_tensor(rows, [height, TILE], layout) if height else None


def _row_desc(grid: Tensor, groups: int) -> TensorDescriptor:
    """Scales or zero points in boxes of so many groups and of one tile's rows."""
    box = [groups, max(TILE, BOX_BYTES // grid.itemsize)]
    return TensorDescriptor(
        grid, list(grid.shape), [grid.stride(0), 1], box, gl.NVMMASharedLayout(0, 8 * grid.itemsize, 2)
    )


_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def registers(tile: Sm90PrefillTile) -> tuple[int, int, int]:
    """Registers a thread of consumers, of the producer, and at the start: those of the tile, or all that an SM has."""
    groups = tile.warpgroups + 1
    most = tile.registers or min(65536 // (128 * groups * tile.residents) // 8 * 8, 232)
    # With 152, not 160, ptxas of Triton 3.9 serialises wgmma or spills where three warpgroups keep 160 columns or more.
    many = tile.block_m // box_rows(tile.block_m) > 8  # boxes: the producer's code is long
    producer = 24 if most <= 80 else 32 if tile.warpgroups == 3 and tile.block_m >= 160 else 56 if many else 40
    consumer = min((most * groups - producer) // tile.warpgroups // 8 * 8, 232)
    return consumer, producer, most


sm90_prefill = runs(plan)
