"""sm90_moe: an expert layer on Hopper's warpgroup matrix units, over blocks of routed rows.

As sm90_prefill: out^T = W @ x^T, W dequantised in registers, of four tiles of 64 rows over one x. Two warpgroups keep
two tiles each, with sums of their own: a gate tile and its up tile, so that the activation is thread-local, or two
adjacent ones; or four warpgroups keep one each. Producers copy codes by TMA; gemm1 gathers rows of x with asynchronous
copies, gemm2 reads the hidden rows by TMA, where gemm1 left them in the order of the route.
"""

# mypy: disable-error-code="assignment, var-annotated, unreachable"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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
from ..moe.route import Route
from ..tuning.sm90_moe_tiles import Sm90MoeTile, tiles_a_step
from ..tuning.sm90_tiles import group_of_tiles
from . import sm90_moe_decode, sm90_moe_few
from ._launch import Launch, runs
from ._permuted_rows import permuted_rows
from ._sm90 import aligned, groups_a_tile
from ._sm90_moe_consumer import part_columns, parts, scales_sums
from ._sm90_moe_producer import BOX_ROWS, NARROW, PAIRS, produce
from ._sm90_moe_units import consume
from ._token_sums import placed_sums
from .route import Turns, route_launches

LEAST_SORTED = 8  # slots a block of experts in act-order, whose rows are put in order by the route
# Of a thread of consumers, and of the producer, which gathers so many rows: together all that an SM has.
REGISTERS = {32: (224, 56), 64: (224, 56), 128: (216, 72)}
# Four warpgroups of consumers, x gathered or by TMA: with the producer what 640 threads start with, 96 each.
FOUR_GATHERED, FOUR = (104, 64), (112, 32)
SHARED_GATHERED, SHARED, SHARED_START = (96, 48), (104, 32), 80  # two programs an SM
UNGATHERED = (232, 40)  # 128 rows with zero points, x by TMA: ptxas of Triton 3.6 spills two words with fewer
ALIGNMENT = 16  # elements: copies take 16 bytes, and Triton knows of multiples of 16


@gluon.jit(do_not_specialize=["which", "slots", "top_k", "tiles_n", "groups"])
def _sm90_moe(
    out_ptr,  # [positions, N, or N/2 where GATED], rows with room for whole units
    out_stride,
    x_ptr,  # [slots / top_k, K], gathered; None: x_desc
    x_stride,
    x_desc,  # [positions, K] in boxes of [32, 64]; None: x_ptr
    narrow_desc,  # the same in boxes of [16, 64]
    codes_desc,  # int32 [2 E, N/128, K/64 * 16, 32] where GATED, else [1, E * N/64, ...], in boxes of a step
    scales_desc,  # [E * K/G, 2, N/2] where GATED, else [..., 1, N], in boxes of the groups and rows of a step
    zeros_desc,  # uint8 like scales, or None: every zero point is 8
    shares_ptr,  # [slots], or None: what multiplies a row of x
    sorted_ptr,  # [positions] int32: slots by expert; padding is `slots`
    expert_ptr,  # [positions / BLOCK_M] int32
    order_ptr,  # [positions / BLOCK_M] int32: blocks in their turn
    used_ptr,  # [1] int32: positions in use
    taken_ptr,  # int32, 0 at the start: units of work that programs have taken, at `which`
    which,
    slots,
    top_k,  # slots of a gathered row of x
    K,
    tiles_n,  # of 64 rows, an expert
    groups,  # rows of scales, an expert
    GROUP: gl.constexpr,
    GATED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    WHOLE: gl.constexpr,  # K is a multiple of 64 * TILES
    BLOCK_M: gl.constexpr,
    WARPGROUPS: gl.constexpr,  # of consumers: 2 of two tiles each, 4 of one
    TILES: gl.constexpr,  # along K, of a stage
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = scales_desc.dtype
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    GATHERS: gl.constexpr = x_ptr is not None
    x_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    xs = ()
    for p in gl.static_range(parts(BLOCK_M)):  # Triton's shapes are powers of two
        xs = xs + (gl.allocate_shared_memory(DTYPE, [STAGES * TILES, part_columns(BLOCK_M, p), 64], x_layout),)
    TILES_N: gl.constexpr = 2 * PAIRS
    codes_layout: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    codes = gl.allocate_shared_memory(gl.int32, [STAGES, TILES_N * TILES * 16, 32], codes_layout)
    scales_layout: gl.constexpr = gl.NVMMASharedLayout(0, 16, 2)
    scales = gl.allocate_shared_memory(DTYPE, [STAGES, GROUPS, TILES_N * 64], scales_layout)
    if zeros_desc is None:
        zeros: gl.constexpr = None
    else:
        zeros_layout: gl.constexpr = gl.NVMMASharedLayout(0, 8, 2)
        zeros = gl.allocate_shared_memory(gl.uint8, [STAGES, GROUPS, TILES_N * 64], zeros_layout)
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    out_layout: gl.constexpr = gl.NVMMASharedLayout(128, OUT.primitive_bitwidth, 2)
    ROOMS: gl.constexpr = PAIRS if GATED else WARPGROUPS  # of 64 columns
    outs = gl.allocate_shared_memory(OUT, [ROOMS, part_columns(BLOCK_M, 0), 64], out_layout)
    if WARPGROUPS == PAIRS or not GATED:
        handing: gl.constexpr = None
    else:
        # Without bank conflicts for sums, of which a warp has 8 rows and 4 pairs of columns at a time.
        up_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
        ups = ()
        for p in gl.static_range(parts(BLOCK_M)):
            ups = ups + (gl.allocate_shared_memory(gl.float32, [PAIRS, part_columns(BLOCK_M, p), 64], up_layout),)
        given = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(PAIRS):
            mbarrier.init(given.index(i), count=1)
            mbarrier.init(taken.index(i), count=1)
        handing = (ups, given, taken)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    words = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    said = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(said.index(i), count=1)
        mbarrier.init(heard.index(i), count=WARPGROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2 if GATHERS else 1)  # copies by TMA, and the gather
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    C: gl.constexpr = CONSUMER_REGISTERS
    P: gl.constexpr = PRODUCER_REGISTERS
    out = (out_ptr, out_stride)
    ring = (xs, codes, scales, full, empty)
    told = (words, said, heard)
    x = (x_ptr, x_stride, x_desc, narrow_desc)
    w = (codes_desc, scales_desc, zeros_desc)
    routing = (sorted_ptr, expert_ptr, order_ptr, used_ptr, taken_ptr + which, slots, top_k)
    sizes = (K, tiles_n, groups)
    # fmt: off
    if WARPGROUPS == PAIRS:
        gl.warp_specialize([
            (consume, (0, out, shares_ptr, ring, zeros, told, outs, handing, routing, sizes,
             GROUP, GATED, ACTIVATION, BLOCK_M, WARPGROUPS, TILES, STAGES)),
            (consume, (1, out, shares_ptr, ring, zeros, told, outs, handing, routing, sizes,
             GROUP, GATED, ACTIVATION, BLOCK_M, WARPGROUPS, TILES, STAGES)),
            (produce, (x, w, ring, zeros, told, routing, sizes,
             GROUP, GATED, WHOLE, BLOCK_M, TILES, STAGES)),
        ], [4, 4], [C, P])
    else:
        gl.warp_specialize([
            (consume, (0, out, shares_ptr, ring, zeros, told, outs, handing, routing, sizes,
             GROUP, GATED, ACTIVATION, BLOCK_M, WARPGROUPS, TILES, STAGES)),
            (consume, (1, out, shares_ptr, ring, zeros, told, outs, handing, routing, sizes,
             GROUP, GATED, ACTIVATION, BLOCK_M, WARPGROUPS, TILES, STAGES)),
            (consume, (2, out, shares_ptr, ring, zeros, told, outs, handing, routing, sizes,
             GROUP, GATED, ACTIVATION, BLOCK_M, WARPGROUPS, TILES, STAGES)),
            (consume, (3, out, shares_ptr, ring, zeros, told, outs, handing, routing, sizes,
             GROUP, GATED, ACTIVATION, BLOCK_M, WARPGROUPS, TILES, STAGES)),
            (produce, (x, w, ring, zeros, told, routing, sizes,
             GROUP, GATED, WHOLE, BLOCK_M, TILES, STAGES)),
        ], [4, 4, 4, 4], [C, C, C, P])
    # fmt: on


def gemm(
    *,
    out: Tensor,
    x: Tensor,
    weight: PackedWeight,
    routing: Route,
    shares: Tensor | None,
    top_k: int | None,
    activation: str | None,
    gated: bool,
    tile: Sm90MoeTile,
    turns: Turns,
    which: int,
) -> Launch:
    """out [positions, N, or N/2 where gated] of the routed rows of x.

    top_k: the row of a slot is slot // top_k; None: rows of x stand in the order of positions, as those of out do.
    shares [slots]: what multiplies a row of x, before the activation.
    turns, which: in what order programs take the blocks, by gemm 1's or 2's count of those taken.
    """
    tiles_n, tiles_k, groups = weight.codes.shape[-2], weight.codes.shape[-1] // TILE_WORDS, weight.scales.shape[-2]
    group = group_of_tiles(weight.group, weight.k)
    halves = 2 if gated else 1
    tiles = weight.codes.view(weight.experts * 2 if gated else 1, -1, tiles_k * 16, TILE_WORDS // 16)
    deep = tiles_a_step(group)
    tiles_box = [halves, 2 * PAIRS.value // halves, 16 * deep, TILE_WORDS // 16]
    args = {
        "out_ptr": out,
        "out_stride": out.stride(0),
        "x_ptr": None if top_k is None else x,
        "x_stride": x.stride(0),
        "x_desc": None if top_k else _box_desc(x, BOX_ROWS.value),
        "narrow_desc": None if top_k else _box_desc(x, NARROW.value),
        "codes_desc": TensorDescriptor.from_tensor(tiles, tiles_box, gl.NVMMASharedLayout(128, 32, 4)),
        "scales_desc": _row_desc(weight.scales, group, halves),
        "zeros_desc": None if weight.zeros is None else _row_desc(weight.zeros, group, halves),
        "shares_ptr": shares,
        "sorted_ptr": routing.sorted_token_ids,
        "expert_ptr": routing.expert_ids,
        "order_ptr": turns.order,
        "used_ptr": routing.num_tokens_post_padded,
        "taken_ptr": turns.taken,
        "which": which - 1,
        "slots": routing.position.numel(),
        "top_k": top_k or 1,
        "K": weight.k,
        "tiles_n": tiles_n,
        "groups": groups,
    }
    consumer, producer, most = registers(tile, top_k is not None, weight.zeros is not None)
    constants = {
        "GROUP": group,
        "GATED": gated,
        "ACTIVATION": activation,
        "WHOLE": weight.k % (deep * TILE) == 0,
        "BLOCK_M": tile.block_m,
        "WARPGROUPS": tile.warpgroups,
        "TILES": deep,
        "STAGES": tile.stages // deep,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
    }
    options = {"num_warps": 4, "launch_pdl": True} | ({"maxnreg": most} if most else {})
    sms = (current_device(x.device) if x.is_cuda else known_device("sm90")).compute_units
    units = routing.expert_ids.numel() * triton.cdiv(tiles_n, 2 * PAIRS.value)
    grid = (min(units, sms * tile.residents),)
    return Launch(fn=_sm90_moe, grid=grid, args=args, constants=constants, options=options)


def registers(tile: Sm90MoeTile, gathers: bool, has_zeros: bool) -> tuple[int, int, int]:
    """Of a thread of consumers, of the producer, and, where programs share an SM, of any at the start, else 0."""
    if tile.warpgroups == 4:
        return *(FOUR_GATHERED if gathers else FOUR), 0
    if tile.residents > 1:
        return *(SHARED_GATHERED if gathers else SHARED), SHARED_START
    if tile.block_m == max(REGISTERS) and has_zeros and not gathers:
        return *UNGATHERED, 0
    return *REGISTERS[tile.block_m], 0


def _rows(count: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """[count, columns] not set, where `like` is, with room behind each row: kernels write a unit's whole width."""
    width = 2 * PAIRS.value * TILE
    return like.new_empty((count, triton.cdiv(columns, width) * width), dtype=dtype)[:, :columns]


def _box_desc(rows: Tensor, count: int) -> TensorDescriptor:
    """Rows of x or out in boxes of so many and of 64 columns."""
    return TensorDescriptor.from_tensor(rows, [count, TILE], gl.NVMMASharedLayout(128, 8 * rows.itemsize, 2))


def _row_desc(grid: Tensor, group: int, halves: int) -> TensorDescriptor:
    """Scales or zero points of all experts in boxes of the rows that a program takes at a time."""
    rows = grid.view(-1, halves, grid.shape[-1] // halves)
    box = [groups_a_tile(group), 1 if halves == 1 else 2, 2 * PAIRS.value * TILE // halves]
    return TensorDescriptor.from_tensor(rows, box, gl.NVMMASharedLayout(0, 8 * grid.itemsize, 3))


def plan(
    *,
    out: Tensor,
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    gated: bool,
    weight_input: bool,
    linear: Callable[[Tensor, PackedWeight], Tensor] | None = None,
    tile: Sm90MoeTile,
) -> tuple[Launch, ...]:
    """The launches of an expert layer, out [T, H]: route, gemm1, gemm2, sums; `linear` is unused here."""
    top_k, in_order = topk_ids.shape[1], w13.perm is None and w2.perm is None
    x, shares = aligned(x, ALIGNMENT), topk_weights.contiguous()
    if tile.block_m == 1 and tile.gemms is not None and in_order:
        layer: dict[str, Any] = {
            "out": out,
            "x": x,
            "w13": w13,
            "w2": w2,
            "topk_weights": shares,
            "topk_ids": topk_ids,
            "activation": activation,
            "gated": gated,
            "weight_input": weight_input,
        }
        if tile.parts and gated:
            return sm90_moe_few.few(**layer, parts=tile.parts, registers=tile.registers)
        return sm90_moe_decode.few(**layer, tile=tile.gemms[0], tile2=tile.gemms[1])
    block = max(tile.block_m, LEAST_SORTED)
    turns = None if tile.gemms else Turns.of(topk_ids, w13.experts, block)
    routing, launches = route_launches(topk_ids, w13.experts, block, pdl=True, turns=turns)
    positions = routing.sorted_token_ids.numel()
    hidden = _rows(positions, w2.k, out.dtype, out)
    # In groups of 32 every weight is scaled, and rounded; rounding y as well would pass bf16's bound on the error.
    rounded = scales_sums(w13.group) and scales_sums(w2.group)
    y = _rows(positions, w2.n, out.dtype if rounded else torch.float32, out)
    x, before1 = _ordered(x, w13, routing, top_k)
    gemm1 = _gemm_of(tile, turns, 1)(
        out=hidden,
        x=x,
        weight=w13,
        routing=routing,
        shares=shares if weight_input else None,
        top_k=None if before1 else top_k,
        activation=activation,
        gated=gated,
    )
    rows, before2 = _ordered(hidden, w2, routing, None)
    gemm2 = _gemm_of(tile, turns, 2)(
        out=y,
        x=rows,
        weight=w2,
        routing=routing,
        shares=None,
        top_k=None,
        activation=None,
        gated=False,
    )
    sums = placed_sums(out, y, routing.position, shares=None if weight_input else shares)
    return *launches, *before1, gemm1, *before2, gemm2, sums


def _gemm_of(tile: Sm90MoeTile, turns: Turns | None, which: int) -> Callable[..., Launch]:
    """The kernel of gemm1 or gemm2, with its tile: mma.sync for narrow blocks, wgmma for wide ones."""
    if tile.gemms is not None:
        return functools.partial(sm90_moe_decode.gemm, tile=tile.gemms[which - 1])
    assert turns is not None
    return functools.partial(gemm, tile=tile, turns=turns, which=which)


def _ordered(x: Tensor, weight: PackedWeight, routing: Route, top_k: int | None) -> tuple[Tensor, tuple[Launch, ...]]:
    """x as a kernel that copies rows whole takes it: in act-order, rows are gathered by a launch before."""
    if weight.perm is None:
        return x, ()
    rows, launch = permuted_rows(x, weight.perm, routing, top_k)
    return rows, (launch,)


sm90_moe = runs(plan)
