"""What sm90_decode has in shared memory for a trip, and how its warps share K: products of several parts at once."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..compat import copy_to_shared, reinterpreted
from ._sm90 import rows_layout
from ._sm90_stream import groups_of_trip


@gluon.jit
def keep_loads_in_order():
    """No load passes this. ptxas moves what the next trip reads to the end of this one, where nothing is on its way."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def keep_shared_memory(KIB: gl.constexpr):
    """Takes so much beside what is in use here, for nothing but that another program finds no room on this SM."""
    if KIB > 0:
        layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        gl.allocate_shared_memory(gl.int8, [KIB, 1024], layout)._keep_alive()


@gluon.constexpr_function
def _asked_layout(columns, warps):
    """Of [groups, columns]: eight a thread, 16 bytes of scales and 8 of zero points."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def _read_layout(groups, warps, size):
    """Of [groups, 8 * size * warps]: each thread has its two rows, in one element or two."""
    return gl.SliceLayout(0, gl.BlockedLayout([1, groups, size], [4, 1, 8], [1, 1, warps], [0, 2, 1]))


# Bytes 0 and 1 of $2 as what codes of that size unpack to (128 + n in bf16, 1024 + n in fp16), in both lanes.
_BOTH_LANES = "prmt.b32 $0, $2, {magic}, 0x4040; prmt.b32 $1, $2, {magic}, 0x4141;"
_BOTH_LANES_BF16 = gl.constexpr(_BOTH_LANES.format(magic="0x43434343"))
_BOTH_LANES_FP16 = gl.constexpr(_BOTH_LANES.format(magic="0x64646464"))


@gluon.jit
def ask_groups(
    scale_slabs,  # [slabs, groups of a trip, PARTS * ROWS]
    zero_slabs,  # the same of uint8, or None
    slab,
    scales_ptr,  # of the first row, [K/G, rows]
    zeros_ptr,  # the same, or None
    stride,
    rows,  # that are there
    part,
    tile,  # the trip's first one in each part
    share,
    tiles,
    GROUP: gl.constexpr,
    CHUNK: gl.constexpr,
    PARTS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Starts copying what the groups of a trip have for each row, in lines of `groups_of_trip`; zeros past the end."""
    COLUMNS: gl.constexpr = scale_slabs.shape[2]
    ROWS: gl.constexpr = COLUMNS // PARTS
    layout: gl.constexpr = _asked_layout(COLUMNS, WARPS)
    line = gl.expand_dims(gl.arange(0, scale_slabs.shape[1], gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)), 0)
    row = column % ROWS
    first = (part + column // ROWS) * share
    mine, group = groups_of_trip(line, first, tile, GROUP, CHUNK)
    at = group * stride + row
    here = (mine < share) & (first + mine < tiles) & (row < rows)
    copy_to_shared(scale_slabs.index(slab), scales_ptr + at, mask=here)
    if zeros_ptr is not None:
        copy_to_shared(zero_slabs.index(slab), zeros_ptr + at, mask=here)


@gluon.jit
def of_chunk(slab, c: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr):
    """What chunk c of a trip has for each row: [WARPS, 8, GROUPS, 2]."""
    rows = slab.slice(c * GROUPS, GROUPS, 0).load(_read_layout(GROUPS, WARPS, 2))
    rows = rows.reshape([GROUPS, WARPS, 8, 2]).permute([1, 2, 0, 3])
    return gl.convert_layout(rows, rows_layout(WARPS, GROUPS), assert_trivial=True)


@gluon.jit
def zeros_of_chunk(slab, c: gl.constexpr, DTYPE: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr):
    """The zero points of chunk c, as `zero_lanes` makes them: [WARPS, 8, GROUPS, 2]."""
    lines: gl.constexpr = slab.shape[0]
    flat: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    pairs = reinterpreted(slab, gl.int16, [lines, 8 * WARPS], flat)
    pairs = pairs.slice(c * GROUPS, GROUPS, 0).load(_read_layout(GROUPS, WARPS, 1))
    text: gl.constexpr = _BOTH_LANES_BF16 if gl.bfloat16 == DTYPE else _BOTH_LANES_FP16
    first, second = gl.inline_asm_elementwise(
        text, "=r,=r,r", [pairs.to(gl.int32)], dtype=(gl.int32,) * 2, is_pure=True, pack=1
    )
    rows = gl.join(first, second).reshape([GROUPS, WARPS, 8, 2]).permute([1, 2, 0, 3])
    return gl.convert_layout(rows, rows_layout(WARPS, GROUPS), assert_trivial=True)


@gluon.jit
def of_parts(a, PARTS: gl.constexpr, layout: gl.constexpr):
    """The first operand [16 * WARPS, columns] of one product as that of PARTS products; nothing moves."""
    ROWS: gl.constexpr = a.shape[0] // PARTS
    return gl.convert_layout(a.reshape([PARTS, ROWS, a.shape[1]]), layout, assert_trivial=True)


@gluon.jit
def beside_parts(scales, WARPS: gl.constexpr, PARTS: gl.constexpr, mma: gl.constexpr):
    """Scales [WARPS, 8, 2] of a thread's rows as a column beside its sums."""
    rows = scales.reshape([WARPS, 8, 2]).permute([0, 2, 1]).reshape([PARTS, 16 * WARPS // PARTS])
    rows = gl.convert_layout(rows, gl.SliceLayout(2, mma), assert_trivial=True)
    return gl.expand_dims(rows.to(gl.float32), 2)
