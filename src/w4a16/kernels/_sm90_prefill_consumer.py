"""The consumers of sm90_prefill: warpgroups of 64 rows of W that dequantise tiles and multiply them with rows of x."""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated, unreachable"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..compat import from_shared
from ._sm90 import (
    centred,
    groups_a_tile,
    of_rows,
    operand,
    scale_lanes,
    sums_layout,
    words_layout,
    zero_lanes,
)
from ._sm90_prefill_producer import main_rows, unit_of, units_of


@gluon.jit
def _centred(codes, scales, zeros, full, done, W: gl.constexpr, TILES: gl.constexpr, DTYPE: gl.constexpr,
    GROUPS: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Codes less zero points, and scales, of the next TILES tiles of the ring."""
    pairs, lanes = (), ()
    for i in gl.static_range(TILES):
        slot = (done + i) % STAGES
        mbarrier.wait(full.index(slot), (done + i) // STAGES & 1)
        scale = of_rows(scales.index(slot * WARPGROUPS + W), GROUPS)
        if zeros is None:
            zero = gl.full(scale.shape, 8, gl.int32, scale.type.layout)
        else:
            zero = of_rows(zeros.index(slot * WARPGROUPS + W).slice(0, 64, 1), GROUPS)
        words = codes.index(slot * WARPGROUPS + W).load(words_layout(4))
        pairs = pairs + (centred(words, zero_lanes(zero, DTYPE), DTYPE, 4),)
        lanes = lanes + (scale_lanes(scale),)
    return pairs, lanes


@gluon.jit
def _operands(pairs, lanes, TILES: gl.constexpr, DTYPE: gl.constexpr, layout: gl.constexpr):
    a = ()
    for i in gl.static_range(TILES):
        a = a + (operand(pairs[i], lanes[i], DTYPE, 4, layout),)
    return a


@gluon.jit
def _started(a, x, acc):
    """acc + a @ x^T, on its way."""
    layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout(x.shape[0]), 2)
    return warpgroup_mma(gl.convert_layout(a, layout, assert_trivial=True), x.permute((1, 0)), acc, is_async=True)


@gluon.jit
def _product(a, xs, sums, done, turns, W: gl.constexpr, TILES: gl.constexpr, WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr, IN_TURN: gl.constexpr,
):  # fmt: skip
    """Starts sums + a @ x^T over the next TILES tiles of x in the ring; in turn: once the warpgroup before has.

    Free of that, two warpgroups share the matrix units, end together, and then both dequantise while those wait.
    """
    if IN_TURN:
        mbarrier.wait(turns.index(W), (done // TILES & 1) ^ (1 if W == 0 else 0))
    for i in gl.static_range(TILES):
        slot = (done + i) % STAGES
        for j in gl.static_range(len(sums)):
            sums = sums[:j] + (_started(a[i], xs[j].index(slot), sums[j]),) + sums[j + 1 :]
    if IN_TURN:
        mbarrier.arrive(turns.index((W + 1) % WARPGROUPS), count=1)
    return sums


@gluon.jit
def _ended(sums):
    """The sums once all products are there."""
    if len(sums) == 1:
        sums = (warpgroup_mma_wait(0, deps=[sums[0]]),)
    else:
        sums = warpgroup_mma_wait(0, deps=[sums[0], sums[1]])
    return sums


@gluon.jit
def _release(empty, done, TILES: gl.constexpr, STAGES: gl.constexpr):
    for i in gl.static_range(TILES):
        mbarrier.arrive(empty.index((done + i) % STAGES), count=1)


@gluon.jit
def _stored(acc, out_desc, bias_ptr, out, m, row, N):
    """Starts copying out^T + bias, of 64 columns of out from `row` on."""
    mma: gl.constexpr = acc.type.layout
    if bias_ptr is not None:
        n = row + gl.arange(0, 64, gl.SliceLayout(1, mma))
        acc += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
    out.store(acc.to(out.dtype).permute([1, 0]))
    fence_async_shared()
    from_shared(out_desc, [m, row], out)


@gluon.jit
def _stored_part(acc, part, m, M):
    """The sums of rows from m on, 16 bytes a thread at a time, in the order that `_add_parts` reads them."""
    SIZE: gl.constexpr = 64 * acc.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    acc = acc.reshape([4, 2, 8, SIZE // 512, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([SIZE])
    at = gl.arange(0, SIZE, flat)
    gl.store(part + at, gl.convert_layout(acc, flat, assert_trivial=True), mask=m + at // 512 * 8 < M)


@gluon.jit
def consume(
    W: gl.constexpr, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, IN_TURN: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's 64 rows of every unit."""
    xs, codes, scales, full, empty, turns = ring
    M, N, K = sizes
    DTYPE: gl.constexpr = scales.dtype
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    TILES: gl.constexpr = BLOCK_K // 64
    MAIN: gl.constexpr = main_rows(BLOCK_M)
    mma: gl.constexpr = sums_layout(MAIN)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    done = 0
    for unit in range(gl.program_id(0), units_of(M, N, BLOCK_M, WARPGROUPS, SPLIT), gl.num_programs(0)):
        block_m, block_n, first, last = unit_of(unit, M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
        row = (block_n * WARPGROUPS + W) * 64
        sums = (gl.zeros([64, MAIN], gl.float32, mma),)
        if BLOCK_M > MAIN:
            sums = sums + (gl.zeros([64, BLOCK_M - MAIN], gl.float32, sums_layout(BLOCK_M - MAIN)),)
        pairs, lanes = _centred(codes, scales, zeros, full, done, W, TILES, DTYPE, GROUPS, WARPGROUPS, STAGES)
        a = _operands(pairs, lanes, TILES, DTYPE, a_layout)
        for _ in range(first + TILES, last, TILES):
            running = _product(a, xs, sums, done, turns, W, TILES, WARPGROUPS, STAGES, IN_TURN)
            pairs, lanes = _centred(
                codes, scales, zeros, full, done + TILES, W, TILES, DTYPE, GROUPS, WARPGROUPS, STAGES
            )
            sums = _ended(running)
            _release(empty, done, TILES, STAGES)
            # Not before the wait: ptxas serialises wgmma whose registers are written while another runs.
            a = _operands(pairs, lanes, TILES, DTYPE, a_layout)
            done += TILES
        sums = _ended(_product(a, xs, sums, done, turns, W, TILES, WARPGROUPS, STAGES, IN_TURN))
        _release(empty, done, TILES, STAGES)
        done += TILES
        if SPLIT == 1:
            tma.store_wait(0)
        for j in gl.static_range(len(sums)):
            m = block_m * BLOCK_M + j * MAIN
            if SPLIT == 1:
                _stored(sums[j], out_descs[j], bias_ptr, outs[j].index(W), m, row, N)
            else:
                part = parts_ptr + (unit * WARPGROUPS + W).to(gl.int64) * (64 * BLOCK_M) + j * (64 * MAIN)
                _stored_part(sums[j], part, m, M)
    if SPLIT == 1:
        tma.store_wait(0)
