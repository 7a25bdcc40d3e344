"""What a stream of tiles of layout SM90 is, from memory into operands of mma.sync: codes in registers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..tuning import sm90_tiles
from ._sm90 import operand

chunk_of = gluon.constexpr_function(sm90_tiles.chunk_of)


@gluon.jit
def put(values, i: gl.constexpr, value):
    """The tuple with another value at i."""
    return values[:i] + (value,) + values[i + 1 :]


@gluon.jit
def words_of(codes_at, i: gl.constexpr, left):
    """Tile i from here on; past the end of K anything: x is zero there."""
    return gl.load(codes_at + i * 512, mask=i < left, eviction_policy="evict_first")


@gluon.jit
def groups_of_trip(line, first, tile, GROUP: gl.constexpr, CHUNK: gl.constexpr):
    """Of the lines that a trip has in shared memory, one for CHUNK tiles or two for a tile of two groups: the tile of
    the part, and the group. first: the part's first tile; tile: the trip's first one in it."""
    if GROUP == 32:
        mine = tile + line // 2
        group = (first + tile) * 2 + line
    else:
        mine = tile + line * CHUNK
        group = (((first + mine) * 64).to(gl.uint32) // GROUP).to(gl.int32)
    return mine, group


@gluon.jit
def ask_l2(codes_at, i, left):
    """Asks the L2 cache for tile i from here on: no register waits for it."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $5, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,l,l,l,r,r,r,r",
        [codes_at + i * 512, left - i],
        dtype=gl.int8,
        is_pure=False,
        pack=4,  # a thread's four words lie in one line
    )


@gluon.jit
def beside_sums(scales, WARPS: gl.constexpr, mma: gl.constexpr):
    """Scales [WARPS, 8, 2] of a thread's rows as a column beside its sums."""
    rows = scales.reshape([WARPS, 8, 2]).permute([0, 2, 1]).reshape([16 * WARPS])
    rows = gl.convert_layout(rows, gl.SliceLayout(1, mma), assert_trivial=True)
    return gl.expand_dims(rows.to(gl.float32), 1)


@gluon.jit
def halves(pairs, DTYPE: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """What `centred` gave of a tile of two groups, as two operands [16 * WARPS, 32]."""
    t0, t1, t2, t3 = pairs
    near0, far0 = gl.split(t0.reshape([WARPS, 8, 4, 2, 2]).permute([0, 1, 2, 4, 3]))
    near1, far1 = gl.split(t1.reshape([WARPS, 8, 4, 2, 2]).permute([0, 1, 2, 4, 3]))
    near2, far2 = gl.split(t2.reshape([WARPS, 8, 4, 2, 2]).permute([0, 1, 2, 4, 3]))
    near3, far3 = gl.split(t3.reshape([WARPS, 8, 4, 2, 2]).permute([0, 1, 2, 4, 3]))
    near = operand((near0, near1, near2, near3), None, DTYPE, WARPS, layout)
    return near, operand((far0, far1, far2, far3), None, DTYPE, WARPS, layout)
