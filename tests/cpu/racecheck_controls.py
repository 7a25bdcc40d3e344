"""Kernels of nothing but a hand-over in shared memory: what racecheck reports of them is of that (measured.md#9)."""

# mypy: disable-error-code="assignment, attr-defined, no-untyped-def, untyped-decorator, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from w4a16.compat import workgroup_barrier
from w4a16.kernels._sm90_moe_producer import hear, tell


@gluon.jit
def _lanes(out_ptr, first):
    lane = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out_ptr + first + lane, first + lane)


@gluon.jit
def partitions(out_ptr):
    """A barrier of the default warps, without which racecheck reports nothing, and Triton's gl.warp_specialize."""
    workgroup_barrier()
    gl.warp_specialize([(_lanes, (out_ptr, 0)), (_lanes, (out_ptr, 128)), (_lanes, (out_ptr, 256))], [4, 4], [24, 24])


@gluon.jit
def _say(told, turns):
    for turn in range(turns):
        tell(told, turn, turn + 1)
    tell(told, turns, 0)


@gluon.jit
def _add(out_ptr, told, first):
    total, turn, word = 0, 0, 1
    while word != 0:
        word = hear(told, turn)
        total += word
        turn += 1
    lane = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out_ptr + first + lane, total + lane)


@gluon.jit(do_not_specialize=["turns"])
def words(out_ptr, turns):
    """Words from a producer to two consumers, as sm90_moe hands over its units of work."""
    words = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    said = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(said.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    fence_async_shared()
    told = (words, said, heard)
    gl.warp_specialize(
        [(_add, (out_ptr, told, 0)), (_add, (out_ptr, told, 128)), (_say, (told, turns))], [4, 4], [24, 24]
    )
