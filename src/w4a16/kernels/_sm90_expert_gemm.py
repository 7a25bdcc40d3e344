"""What the expert kernels of mma.sync share: a GEMM's arguments, the product of a tile, the sums of a cluster."""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..compat import copy_to_shared
from ..layouts import PackedWeight
from ..layouts.sm90 import TILE, TILE_WORDS
from ..tuning.sm90_tiles import group_of_tiles
from ._launch import Launch
from ._sm90 import cluster_barrier, operand
from ._sm90_stream import beside_sums, chunk_of, groups_of_trip, halves


@dataclass(frozen=True, kw_only=True)
class ExpertGemm:
    """One GEMM of an expert layer.

    experts     [blocks]: the expert of a block of rows; none of 0 to E - 1: no work
    shares      [slots]: multiply a row, in fp32; None: nothing does
    top_k       slots of a row of x
    activation  of the output's rows, or of their gate half; None: none
    """

    out: Tensor
    x: Tensor
    weight: PackedWeight
    experts: Tensor
    shares: Tensor | None
    top_k: int | None
    activation: str | None = None
    gated: bool = False

    @property
    def width(self) -> int:
        """Columns of out."""
        return self.weight.n // (2 if self.gated else 1)

    @property
    def tiles(self) -> int:
        """Of 64 columns, in K."""
        return -(-self.weight.k // TILE)

    def launch(
        self,
        fn: Any,
        grid: tuple[int, ...],
        *,
        args: dict[str, Any],
        constants: dict[str, Any],
        options: dict[str, Any],
        cluster: int = 1,
    ) -> Launch:
        """Of `fn`, which takes these arguments and constants besides its own, in the order of its signature."""
        weight = self.weight
        values = {
            "out_ptr": self.out,
            "x_ptr": self.x,
            "codes_ptr": weight.codes,
            "scales_ptr": weight.scales,
            "zeros_ptr": weight.zeros,
            "shares_ptr": self.shares,
            "expert_ptr": self.experts,
            "experts": weight.experts,
            "N": weight.n,
            "width": self.width,
            "K": weight.k,
            "out_stride": self.out.stride(0),
            "x_stride": self.x.stride(0),
            "codes_expert": weight.codes.stride(0),
            "codes_stride": self.tiles * TILE_WORDS,
            "scales_expert": weight.scales.stride(0),
            "scales_stride": weight.scales.shape[-1],
            **args,
        }
        common = {
            "GROUP": group_of_tiles(weight.group, weight.k),
            "TOP_K": self.top_k,
            "ACTIVATION": self.activation,
            "GATED": self.gated,
        }
        return Launch(
            fn=fn,
            grid=grid,
            cluster=cluster,
            args={name: values[name] for name in fn.arg_names if name in values},
            constants=common | constants,
            options={"launch_pdl": True, **options},
        )


@gluon.jit
def columns_of(slab, at: gl.constexpr, GROUPS: gl.constexpr, b_layout: gl.constexpr):
    """The tile of x whose columns begin at `at`, as second operands of the matrix instruction, one for each group."""
    if GROUPS == 1:
        xs = (slab.slice(at, 64, 1).permute((1, 0)).load(b_layout),)
    else:
        near = slab.slice(at, 32, 1).permute((1, 0)).load(b_layout)
        xs = (near, slab.slice(at + 32, 32, 1).permute((1, 0)).load(b_layout))
    return xs


@gluon.jit
def operands(pairs, GROUPS: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """What `centred` gave of a tile, as first operands of the matrix instruction, one for each group."""
    if GROUPS == 1:
        codes = (operand(pairs, None, DTYPE, WARPS, layout),)
    else:
        codes = halves(pairs, DTYPE, WARPS, layout)
    return codes


@gluon.jit
def multiplied(acc, part, codes, xs, scales, GROUPS: gl.constexpr, WARPS: gl.constexpr, mma: gl.constexpr):
    """acc and part, with a tile's product added: to part, which is yet to be scaled, or to acc where groups are 32."""
    if GROUPS == 1:
        part = mma_v2(codes[0], xs[0], part)
    else:
        near_scale, far_scale = gl.split(scales.permute([0, 1, 3, 2]))
        near = mma_v2(codes[0], xs[0], part)
        far = mma_v2(codes[1], xs[1], part)
        acc = acc + near * beside_sums(near_scale, WARPS, mma) + far * beside_sums(far_scale, WARPS, mma)
    return acc, part


@gluon.constexpr_function
def _asked_layout(columns, size, warps):
    """Of [groups, columns]: 16 bytes a thread."""
    return gl.BlockedLayout([1, size], [32 * size // columns, columns // size], [warps, 1], [1, 0])


@gluon.jit
def ask_rows(
    slab,  # [groups of a trip, rows of a program]
    grid_ptr,  # scales or zero points of an expert, [K/G, N_PADDED]
    stride,
    here,  # the program among those along N, rows from one half to the other; its first tile, the trip's, how many
    GROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Starts copying what the groups of a trip have for each row, in lines of `groups_of_trip`; zeros past the end."""
    block_n, width, first, tile, tiles = here
    CHUNK: gl.constexpr = chunk_of(GROUP, DEPTH)
    COLUMNS: gl.constexpr = slab.shape[1]
    HALF: gl.constexpr = COLUMNS // HALVES
    layout: gl.constexpr = _asked_layout(COLUMNS, 128 // slab.dtype.primitive_bitwidth, gl.num_warps())
    line = gl.expand_dims(gl.arange(0, slab.shape[0], gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)), 0)
    row = block_n * HALF + column % HALF + column // HALF * width
    mine, group = groups_of_trip(line, first, tile, GROUP, CHUNK)
    copy_to_shared(slab, grid_ptr + group * stride + row, mask=(mine < tiles) & (row < stride))


@gluon.constexpr_function
def pairs_layout(half, warps):
    """Of [half, columns, 2]: gate and up in one thread."""
    lanes = min(32, half // 2)
    return gl.BlockedLayout([2, 1, 2], [lanes, 32 // lanes, 1], [1, warps, 1], [2, 0, 1])


@gluon.jit
def paired(acc, layout: gl.constexpr):
    """Sums of gate rows and then of up rows as (gate, up) in one thread."""
    HALF: gl.constexpr = acc.shape[0] // 2
    return gl.split(gl.convert_layout(acc.reshape([2, HALF, acc.shape[1]]).permute([1, 2, 0]), layout))


@gluon.jit
def leave_sums(parts_ptr, acc, n, m, ROUTED: gl.constexpr):
    """Leaves a program's sums [rows, BLOCK_M] where the others of its cluster find them, and waits for theirs."""
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    at_part = gl.expand_dims(n, 1) * acc.shape[1] + gl.expand_dims(m, 0)
    here = gl.expand_dims(m, 0) < ROUTED + gl.expand_dims(n * 0, 1)
    gl.store(parts_ptr + gl.program_id(0).to(gl.int64) * SIZE + at_part, acc, mask=here)
    cluster_barrier()


@gluon.jit
def cluster_sums(
    parts_ptr,
    split,
    ROUTED: gl.constexpr,
    HALF: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WARPS: gl.constexpr,
    HALVES: gl.constexpr,
    SPLIT: gl.constexpr,
    SHARERS: gl.constexpr,
):
    """A program's share of the rows, n, and their sums over its cluster, for each half."""
    MINE: gl.constexpr = HALF // SHARERS
    mine: gl.constexpr = gl.BlockedLayout([1, 1], [32 // BLOCK_M, BLOCK_M], [WARPS, 1], [1, 0])
    n = split * MINE + gl.arange(0, MINE, gl.SliceLayout(1, mine))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mine))
    at_part = gl.expand_dims(n, 1) * BLOCK_M + gl.expand_dims(m, 0)
    here = gl.expand_dims(m, 0) < ROUTED + gl.expand_dims(n * 0, 1)
    sums = ()
    for half in gl.static_range(HALVES):
        total = gl.zeros([MINE, BLOCK_M], gl.float32, mine)
        for i in gl.static_range(SPLIT):
            at = (gl.program_id(0) - split + i) * HALVES + half
            at_ptr = parts_ptr + at.to(gl.int64) * (HALF * BLOCK_M) + at_part
            total += gl.load(at_ptr, mask=here, other=0.0, cache_modifier=".cg")
        sums = sums + (total,)
    return sums, n, m
