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

from ..compat import from_shared, reinterpreted
from ._sm90 import (
    centred,
    cluster_barrier,
    groups_a_tile,
    of_rows,
    operand,
    rows_layout,
    sums_layout,
    words_layout,
    zero_lanes,
)
from ._sm90_prefill_producer import after, groups_a_box, product_rows, rows_before, tiles_a_box, unit_of, units_of


@gluon.jit
def _scales_of_rows(scales, GROUPS: gl.constexpr):
    """[GROUPS, 64] scales of shared memory, each in both 16-bit lanes of an int32: one instruction each."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, 0, 0x1010; prmt.b32 $1, $2, 0, 0x3232;",
        "=r,=r,r",
        [of_rows(scales, GROUPS).to(gl.int16, bitcast=True)],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.constexpr_function
def _pairs_layout(groups):
    """[groups, 32] zero points of two rows each: as `of_rows` has the rows."""
    return gl.SliceLayout(0, gl.BlockedLayout([1, groups, 1], [4, 1, 8], [1, 1, 4], [0, 2, 1]))


@gluon.constexpr_function
def _zero_text(dtype, pairs):
    """Of so many pairs of zero points, the lanes of each one's first and then of each one's second."""
    high = "0x43" if gl.bfloat16 == dtype else "0x64"
    byte = [f"{i:x}" for j in range(2) for i in range(j, 2 * pairs, 2)]
    return " ".join(f"prmt.b32 ${i}, ${2 * pairs}, {high}, 0x4{b}4{b};" for i, b in enumerate(byte))


@gluon.jit
def _zeros_of_rows(zeros, DTYPE: gl.constexpr, GROUPS: gl.constexpr):
    """uint8 [GROUPS, 128] of shared memory, of which 64 count, as `zero_lanes` makes them: one instruction each."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    pairs = reinterpreted(zeros, gl.int16, [GROUPS, 64], flat).slice(0, 32, 1).load(_pairs_layout(GROUPS))
    pairs = pairs.reshape([GROUPS, 4, 8]).permute([1, 2, 0])
    if GROUPS == 1:
        first, second = gl.inline_asm_elementwise(
            _zero_text(DTYPE, 1), "=r,=r,r", [pairs.to(gl.int32)], dtype=(gl.int32,) * 2, is_pure=True, pack=1
        )
    else:
        first, second = gl.inline_asm_elementwise(
            _zero_text(DTYPE, 2), "=r,=r,=r,=r,r", [pairs], dtype=(gl.int32,) * 2, is_pure=True, pack=2
        )
    return gl.convert_layout(gl.join(first, second), rows_layout(4, GROUPS), assert_trivial=True)


@gluon.jit
def _of_tiles(lanes, GROUPS: gl.constexpr):
    """Those of a box for each of two tiles with groups of their own, or for all of its tiles."""
    if lanes.shape[2] == GROUPS:
        each = (lanes,)
    else:
        layout: gl.constexpr = rows_layout(4, GROUPS)
        first, second = gl.split(lanes.reshape([4, 8, 2, GROUPS, 2]).permute([0, 1, 3, 4, 2]))
        first = gl.convert_layout(first, layout, assert_trivial=True)
        each = (first, gl.convert_layout(second, layout, assert_trivial=True))
    return each


@gluon.jit
def _centred(codes, scales, zeros, full, slot, phase, W: gl.constexpr, TILES: gl.constexpr, GROUP: gl.constexpr,
    DTYPE: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """Codes less zero points, and scales, of the tiles of the ring's next step."""
    GROUPS: gl.constexpr = groups_a_tile(GROUP)
    SHARED: gl.constexpr = tiles_a_box(GROUP, TILES)
    BOX_GROUPS: gl.constexpr = groups_a_box(GROUP, TILES)
    mbarrier.wait(full.index(slot), phase)
    at = slot * WARPGROUPS + W
    pairs, lanes = (), ()
    for i in gl.static_range(TILES):
        if i % SHARED == 0:
            box = (at * TILES + i) // SHARED
            factor = _scales_of_rows(scales.index(box), BOX_GROUPS)
            if zeros is None:
                offset = zero_lanes(gl.full(factor.shape, 8, gl.int32, factor.type.layout), DTYPE)
            else:
                offset = _zeros_of_rows(zeros.index(box), DTYPE, BOX_GROUPS)
            factors, offsets = _of_tiles(factor, GROUPS), _of_tiles(offset, GROUPS)
        words = codes.index(at).slice(i * 16, 16, 0).load(words_layout(4))
        pairs = pairs + (centred(words, offsets[i % len(offsets)], DTYPE, 4),)
        lanes = lanes + (factors[i % len(factors)],)
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
def _product(a, xs, sums, slot, turns, turn, W: gl.constexpr, TILES: gl.constexpr, WARPGROUPS: gl.constexpr,
    IN_TURN: gl.constexpr,
):  # fmt: skip
    """Starts sums + a @ x^T over the tiles of x of a step; in turn: once the warpgroup before has.

    Free of that, two warpgroups share the matrix units, end together, and then both dequantise while those wait.
    """
    if IN_TURN:
        mbarrier.wait(turns.index(W), turn ^ (1 if W == 0 else 0))
    for i in gl.static_range(TILES):
        for j in gl.static_range(len(sums)):
            sums = sums[:j] + (_started(a[i], xs[j].index(slot * TILES + i), sums[j]),) + sums[j + 1 :]
    if IN_TURN:
        mbarrier.arrive(turns.index((W + 1) % WARPGROUPS), count=1)
    return sums


@gluon.jit
def _ended(sums):
    """The sums once all products are there."""
    if len(sums) == 1:
        sums = (warpgroup_mma_wait(0, deps=[sums[0]]),)
    elif len(sums) == 2:
        sums = warpgroup_mma_wait(0, deps=[sums[0], sums[1]])
    else:
        sums = warpgroup_mma_wait(0, deps=[sums[0], sums[1], sums[2]])
    return sums


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


@gluon.constexpr_function
def _flat_layout():
    """Of all sums of a warpgroup, 16 bytes a thread at a time."""
    return gl.BlockedLayout([4], [32], [4], [0])


@gluon.jit
def _stored_part(acc, part, m, M):
    """The sums of rows from m on, in the order that `_add_parts` and `_part` read them."""
    SIZE: gl.constexpr = 64 * acc.shape[1]
    flat: gl.constexpr = _flat_layout()
    acc = acc.reshape([4, 2, 8, SIZE // 512, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([SIZE])
    at = gl.arange(0, SIZE, flat)
    gl.store(part + at, gl.convert_layout(acc, flat, assert_trivial=True), mask=m + at // 512 * 8 < M)


@gluon.jit
def _part(part, m, M, COLUMNS: gl.constexpr):
    """What `_stored_part` stored, as a warpgroup's sums."""
    at = gl.arange(0, 64 * COLUMNS, _flat_layout())
    acc = gl.load(part + at, mask=m + at // 512 * 8 < M, other=0.0, cache_modifier=".cg")
    acc = acc.reshape([COLUMNS // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([64, COLUMNS])
    return gl.convert_layout(acc, sums_layout(COLUMNS), assert_trivial=True)


@gluon.jit
def _halves(acc, rank):
    """Of the sums' columns: the half that this program of a pair adds up, and the other."""
    COLUMNS: gl.constexpr = acc.shape[1] // 2
    layout: gl.constexpr = sums_layout(COLUMNS)
    first, last = gl.split(acc.reshape([64, 2, COLUMNS]).permute([0, 2, 1]))
    first = gl.convert_layout(first, layout, assert_trivial=True)
    last = gl.convert_layout(last, layout, assert_trivial=True)
    return gl.where(rank == 0, first, last), gl.where(rank == 0, last, first)


@gluon.jit
def _here(number):
    """An integer, computed at this place and no later: its divisions would else delay a unit's last product."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _zeros(COLUMNS: gl.constexpr):
    layout: gl.constexpr = sums_layout(COLUMNS)
    return gl.zeros([64, COLUMNS], gl.float32, layout)


@gluon.jit
def _stored_pair(
    sums, out_descs, bias_ptr, parts_ptr, outs, unit, m, row, M, N,
    W: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Gives the other program of the pair its half of the columns, and starts copying its own half, added up."""
    rank = unit % 2
    given = parts_ptr + (unit * WARPGROUPS + W).to(gl.int64) * (32 * BLOCK_M)
    taken = parts_ptr + ((unit + 1 - 2 * rank) * WARPGROUPS + W).to(gl.int64) * (32 * BLOCK_M)
    kept = ()
    for j in gl.static_range(len(sums)):
        keep, give = _halves(sums[j], rank)
        at = m + rows_before(BLOCK_M, j) + (1 - rank) * give.shape[1]
        _stored_part(give, given + 32 * rows_before(BLOCK_M, j), at, M)
        kept = kept + (keep,)
    cluster_barrier()
    for j in gl.static_range(len(sums)):
        at = m + rows_before(BLOCK_M, j) + rank * kept[j].shape[1]
        total = kept[j] + _part(taken + 32 * rows_before(BLOCK_M, j), at, M, kept[j].shape[1])
        _stored(total, out_descs[j], bias_ptr, outs[j].index(W), at, row, N)


@gluon.jit
def consume(
    W: gl.constexpr, out_descs, bias_ptr, parts_ptr, ring, zeros, outs, sizes,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    RING: gl.constexpr, IN_TURN: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's 64 rows of every unit."""
    xs, codes, scales, full, empty, turns = ring
    M, N, K = sizes
    DTYPE: gl.constexpr = scales.dtype
    TILES: gl.constexpr = BLOCK_K // 64
    a_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout(product_rows(BLOCK_M, 0)), 2)
    slot, phase, turn = 0, 0, 0
    for unit in range(gl.program_id(0), units_of(M, N, BLOCK_M, WARPGROUPS, SPLIT), gl.num_programs(0)):
        block_m, block_n, first, last = unit_of(unit, M, N, K, BLOCK_M, BLOCK_K, WARPGROUPS, SPLIT)
        row, column = _here((block_n * WARPGROUPS + W) * 64), _here(block_m * BLOCK_M)
        sums = ()
        for j in gl.static_range(len(xs)):
            sums = sums + (_zeros(product_rows(BLOCK_M, j)),)
        pairs, lanes = _centred(codes, scales, zeros, full, slot, phase, W, TILES, GROUP, DTYPE, WARPGROUPS)
        a = _operands(pairs, lanes, TILES, DTYPE, a_layout)
        for _ in range(first + TILES, last, TILES):
            running = _product(a, xs, sums, slot, turns, turn, W, TILES, WARPGROUPS, IN_TURN)
            before = slot
            slot, phase = after(slot, phase, 1, RING)
            pairs, lanes = _centred(codes, scales, zeros, full, slot, phase, W, TILES, GROUP, DTYPE, WARPGROUPS)
            # Passed at once: ptxas would else unpack these codes after the wait for the products, not beside them. With
            # three warpgroups and many sums, that of Triton 3.9 then spills.
            if WARPGROUPS < 3 or BLOCK_M < 160:
                mbarrier.wait(full.index(slot), phase)
            sums = _ended(running)
            mbarrier.arrive(empty.index(before), count=1)
            # Not before the wait: ptxas serialises wgmma whose registers are written while another runs.
            a = _operands(pairs, lanes, TILES, DTYPE, a_layout)
            turn ^= 1
        sums = _ended(_product(a, xs, sums, slot, turns, turn, W, TILES, WARPGROUPS, IN_TURN))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = after(slot, phase, 1, RING)
        turn ^= 1
        if PAIRED:
            _stored_pair(sums, out_descs, bias_ptr, parts_ptr, outs, unit, column, row, M, N, W, WARPGROUPS, BLOCK_M)
        else:
            if SPLIT == 1:
                tma.store_wait(0)
            for j in gl.static_range(len(sums)):
                m = column + rows_before(BLOCK_M, j)
                if SPLIT == 1:
                    _stored(sums[j], out_descs[j], bias_ptr, outs[j].index(W), m, row, N)
                else:
                    part = parts_ptr + (unit * WARPGROUPS + W).to(gl.int64) * (64 * BLOCK_M)
                    _stored_part(sums[j], part + 64 * rows_before(BLOCK_M, j), m, M)
    if SPLIT == 1 or PAIRED:
        tma.store_wait(0)
