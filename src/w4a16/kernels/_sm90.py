"""What the Hopper kernels share: layout SM90's codes as operand of the matrix instructions, in registers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 128 + n in bf16 and 1024 + n in fp16 have n's four bits as their last ones. $4 is the word; $5 and $6 are the zero
# points of a thread's two rows in both lanes. Results: columns 2c and 2c + 1 of both rows, then those eight on.
_CENTRED_BF16 = gl.constexpr("""{ .reg .b32 q1, q2, q3, t0, t1, t2, t3;
    shr.u32 q1, $4, 4; shr.u32 q2, $4, 8; shr.u32 q3, $4, 12;
    lop3.b32 t0, $4, 0x000f000f, 0x43004300, 0xEA;
    lop3.b32 t1, q1, 0x000f000f, 0x43004300, 0xEA;
    lop3.b32 t2, q2, 0x000f000f, 0x43004300, 0xEA;
    lop3.b32 t3, q3, 0x000f000f, 0x43004300, 0xEA;
    sub.rn.bf16x2 $0, t0, $5; sub.rn.bf16x2 $1, t1, $6; sub.rn.bf16x2 $2, t2, $5; sub.rn.bf16x2 $3, t3, $6; }""")
# fp16 has room for the second row's codes where they are: 1024 + 16 n. A sixteenth of that, less 64 and the zero point
# ($6 is minus both), is as exact, and two shifts fewer (FasterTransformer, interleaved_numeric_conversion.h).
_CENTRED_FP16 = gl.constexpr("""{ .reg .b32 q, t0, t1, t2, t3, sixteenth;
    shr.u32 q, $4, 8; mov.b32 sixteenth, 0x2C002C00;
    lop3.b32 t0, $4, 0x000f000f, 0x64006400, 0xEA;
    lop3.b32 t1, $4, 0x00f000f0, 0x64006400, 0xEA;
    lop3.b32 t2, q, 0x000f000f, 0x64006400, 0xEA;
    lop3.b32 t3, q, 0x00f000f0, 0x64006400, 0xEA;
    sub.rn.f16x2 $0, t0, $5; fma.rn.f16x2 $1, t1, sixteenth, $6;
    sub.rn.f16x2 $2, t2, $5; fma.rn.f16x2 $3, t3, sixteenth, $6; }""")
_MINUS_64 = gl.constexpr(0xD400D400 - (1 << 32))  # in both lanes; its last bits count sixteenths
# $8 to $11: those results; $12 and $13: the scales of the two rows in both lanes.
_SCALED = """{{ .reg .b32 t0, t1, t2, t3;
    mul.rn.{lanes} t0, $8, $12; mul.rn.{lanes} t1, $9, $13; mul.rn.{lanes} t2, $10, $12; mul.rn.{lanes} t3, $11, $13;
    mov.b32 {{$0, $1}}, t0; mov.b32 {{$2, $3}}, t1; mov.b32 {{$4, $5}}, t2; mov.b32 {{$6, $7}}, t3; }}"""
_HALVES = gl.constexpr("mov.b32 {$0, $1}, $8; mov.b32 {$2, $3}, $9; mov.b32 {$4, $5}, $10; mov.b32 {$6, $7}, $11;")
_SCALED_BF16, _SCALED_FP16 = (gl.constexpr(_SCALED.format(lanes=lanes)) for lanes in ("bf16x2", "f16x2"))


@gluon.constexpr_function
def words_layout(warps):
    """Of int32 [4 * warps, 32], one column of tiles: 16 bytes a thread."""
    return gl.BlockedLayout([1, 4], [4, 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def codes_layout(warps):
    """The same words by the codes they hold: [warp, r, c, step of 16 columns]."""
    return gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [warps, 1, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def _wide_layout(warps, groups):
    """[warp, r, c, group of the tile, step of the group, row half]"""
    return gl.BlockedLayout(
        [1, 1, 1, groups, 4 // groups, 2], [1, 8, 4, 1, 1, 1], [warps, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )


@gluon.constexpr_function
def rows_layout(warps, groups):
    """Of [warp, r, group of the tile, row half]: scales and zero points of a thread's two rows."""
    return gl.SliceLayout(2, gl.SliceLayout(4, _wide_layout(warps, groups)))


@gluon.constexpr_function
def groups_a_tile(group):
    """How many groups a tile of 64 columns spans: 1, or 2 in groups of 32."""
    return 2 if group == 32 else 1


@gluon.jit
def row_offsets(WARPS: gl.constexpr, GROUPS: gl.constexpr, stride):
    """Where the scales of a thread's rows lie: [WARPS, 8, GROUPS, 2], of one tile."""
    layout: gl.constexpr = rows_layout(WARPS, GROUPS)
    w = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    r = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    g = gl.arange(0, GROUPS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    a = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    w = gl.expand_dims(gl.expand_dims(gl.expand_dims(w, 1), 2), 3)
    r = gl.expand_dims(gl.expand_dims(gl.expand_dims(r, 0), 2), 3)
    g = gl.expand_dims(gl.expand_dims(gl.expand_dims(g, 0), 1), 3)
    a = gl.expand_dims(gl.expand_dims(gl.expand_dims(a, 0), 1), 2)
    return w * 16 + r * 2 + a + g * stride


@gluon.constexpr_function
def sums_layout(columns):
    """Of [64, columns] sums of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def _row_layout(groups):
    """Of [groups, 64] scales or zero points in shared memory: each thread has those of its two rows."""
    return gl.SliceLayout(0, gl.BlockedLayout([1, groups, 2], [4, 1, 8], [1, 1, 4], [0, 2, 1]))


@gluon.jit
def of_rows(shared, GROUPS: gl.constexpr):
    """[GROUPS, 64] of shared memory as [warp, r, GROUPS, row half]."""
    rows = shared.load(_row_layout(GROUPS)).reshape([GROUPS, 4, 8, 2]).permute([1, 2, 0, 3])
    return gl.convert_layout(rows, rows_layout(4, GROUPS), assert_trivial=True)


@gluon.jit
def zero_lanes(zeros, DTYPE: gl.constexpr):
    """uint8 zero points as what a code of that size unpacks to, in both 16-bit lanes of an int32."""
    magic: gl.constexpr = 0x43004300 if gl.bfloat16 == DTYPE else 0x64006400
    return (zeros.to(gl.int32) * 0x10001) | magic


@gluon.jit
def scale_lanes(scales):
    """16-bit scales in both lanes of an int32."""
    return (scales.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) * 0x10001


@gluon.jit
def _spread(lanes, WARPS: gl.constexpr):
    """[WARPS, 8, groups, 2] over the words of a tile, one tensor for each row half."""
    GROUPS: gl.constexpr = lanes.shape[2]
    like = gl.full([WARPS, 8, 4, GROUPS, 4 // GROUPS, 2], 0, gl.int32, _wide_layout(WARPS, GROUPS))
    wide, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(lanes, 2), 4), like)
    first, second = gl.split(wide.reshape([WARPS, 8, 4, 4, 2]))
    layout: gl.constexpr = codes_layout(WARPS)
    first = gl.convert_layout(first, layout, assert_trivial=True)
    return first, gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def centred(words, zeros, DTYPE: gl.constexpr, WARPS: gl.constexpr):
    """words int32 [4 * WARPS, 32], one column of tiles -> codes less zero points, exact: four registers a word.

    zeros as `zero_lanes` makes them.
    """
    codes = gl.convert_layout(words.reshape([WARPS, 8, 4, 4]), codes_layout(WARPS), assert_trivial=True)
    z0, z1 = _spread(zeros, WARPS)
    if gl.float16 == DTYPE:
        z1 = ((z1 & 0x003F003F) << 4) | _MINUS_64
    text: gl.constexpr = _CENTRED_BF16 if gl.bfloat16 == DTYPE else _CENTRED_FP16
    return gl.inline_asm_elementwise(
        text, "=r,=r,=r,=r,r,r,r", [codes, z0, z1], dtype=(gl.int32,) * 4, is_pure=True, pack=1
    )


@gluon.jit
def operand(pairs, scales, DTYPE: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """What `centred` gave, times scales -> [16 * WARPS, 64], the first operand of a matrix instruction; nothing moves.

    scales  as `scale_lanes` makes them; None: not scaled
    """
    t0, t1, t2, t3 = pairs
    if scales is None:
        h = gl.inline_asm_elementwise(
            _HALVES,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
            [t0, t1, t2, t3],
            dtype=(gl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        s0, s1 = _spread(scales, WARPS)
        scaled: gl.constexpr = _SCALED_BF16 if gl.bfloat16 == DTYPE else _SCALED_FP16
        h = gl.inline_asm_elementwise(
            scaled,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r",
            [t0, t1, t2, t3, s0, s1],
            dtype=(gl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
    near = gl.join(gl.join(h[0], h[1]), gl.join(h[2], h[3]))  # w r c j, d a
    far = gl.join(gl.join(h[4], h[5]), gl.join(h[6], h[7]))
    both = gl.join(near, far).permute([0, 5, 1, 3, 6, 2, 4])  # (w a r) (j b c d)
    both = both.reshape([16 * WARPS, 16 * t0.shape[3]]).to(DTYPE, bitcast=True)
    return gl.convert_layout(both, layout, assert_trivial=True)


@gluon.jit
def wait_for_the_kernel_before():
    """Programmatic dependent launch: what earlier kernels of the stream wrote is there after this."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_the_next_kernel_start():
    """Programmatic dependent launch: the next kernel may take what room is left, and load its weights."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def cluster_barrier():
    """Waits for every warp of the cluster; what they wrote to memory before is there after.

    For warps without a part in that too: NVIDIA's racecheck waits for ever for those that arrive and do not wait.
    """
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


def aligned(x: Tensor, elements: int) -> Tensor:
    """x [M, K], or a copy where its rows lie no multiple of `elements` apart or its address is none of 16 bytes."""
    if x.stride(0) % elements or (not x.is_meta and x.data_ptr() % 16):
        return x.clone(memory_format=torch.contiguous_format)
    return x
