"""What hides under Hopper's wgmma: two warpgroups multiply while two others issue one kind of instruction.

For each kind: instructions a clock that a scheduler issues of it alone, and the share of the shorter of both times that
is hidden when wgmma runs beside (1: all of it, 0: both take as long as one after the other). On an H100:

    python benchmarks/hopper_overlap.py [--columns 64,128]
"""

# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"

from __future__ import annotations

import argparse
import statistics

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from w4a16.device import Stopwatch, this_machine

# t = f(t, $2, $3) of 32-bit registers; those of dequantising first.
KINDS = {
    "lop3, immediates": "lop3.b32 t, t, 0x000f000f, $2, 0xEA;",
    "lop3": "lop3.b32 t, t, $2, $3, 0x96;",
    "shift": "shf.r.wrap.b32 t, t, t, 4;",
    "prmt": "prmt.b32 t, t, $2, 0x5410;",
    "add.bf16x2": "add.rn.bf16x2 t, t, $2;",
    "fma.bf16x2": "fma.rn.bf16x2 t, t, $2, $3;",
    "mul.bf16x2": "mul.rn.bf16x2 t, t, $2;",
    "add.f16x2": "add.rn.f16x2 t, t, $2;",
    "fma.f16x2": "fma.rn.f16x2 t, t, $2, $3;",
    "mul.f32": "mul.rn.f32 t, t, $2;",
    "fma.f32": "fma.rn.f32 t, t, $2, $3;",
    "mad.s32": "mad.lo.s32 t, t, $2, $3;",
}
REPEATED = 32  # of an instruction, a register and turn
REGISTERS = gl.constexpr(8)  # of a thread, one chain of instructions each
OUT = 1 << 21  # words


def text_of(kind: str) -> str:
    """Of $1, by as many instructions of that kind as a register takes a turn, in PTX."""
    return f"{{ .reg .b32 t; mov.b32 t, $1; {KINDS[kind] * REPEATED} mov.b32 $0, t; }}"


@gluon.jit
def _issue(out_ptr, turns, w: gl.constexpr, TEXT: gl.constexpr):
    i = gl.arange(0, 128 * REGISTERS, gl.BlockedLayout([REGISTERS], [32], [4], [0]))
    t, a, b = i + turns, gl.load(out_ptr + i), gl.load(out_ptr + i + 1)
    for _ in range(turns):
        t = gl.inline_asm_elementwise(TEXT, "=r,r,r,r", [t, a, b], dtype=gl.int32, is_pure=False, pack=1)
    gl.store(out_ptr + (gl.program_id(0) * 4 + w) * (128 * REGISTERS) + i, t)


@gluon.jit
def _multiply(out_ptr, x, turns, w: gl.constexpr, OF_REGISTERS: gl.constexpr):
    COLUMNS: gl.constexpr = x.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    acc = gl.zeros([64, COLUMNS], gl.float32, mma)
    if OF_REGISTERS:
        a = gl.full([64, 64], 1.0, gl.bfloat16, gl.DotOperandLayout(0, mma, 2))
        for _ in range(turns):
            acc, a = warpgroup_mma_wait(0, deps=(warpgroup_mma(a, x, acc, is_async=True), a))
    else:
        for _ in range(turns):
            acc = warpgroup_mma_wait(0, deps=(warpgroup_mma(x.slice(0, 64, 1), x, acc, is_async=True),))
    total = gl.sum(acc, 1).to(gl.int32)
    gl.store(out_ptr + (gl.program_id(0) * 4 + w) * 64 + gl.arange(0, 64, total.type.layout), total)


@gluon.jit
def _both(out_ptr, products, turns, TEXT: gl.constexpr, COLUMNS: gl.constexpr, OF_REGISTERS: gl.constexpr):
    x = gl.allocate_shared_memory(gl.bfloat16, [64, COLUMNS], gl.NVMMASharedLayout(128, 16, 2))
    x.store(gl.full([64, COLUMNS], 1.0, gl.bfloat16, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out_ptr, x, products, 0, OF_REGISTERS)),
            (_multiply, (out_ptr, x, products, 1, OF_REGISTERS)),
            (_issue, (out_ptr, turns, 2, TEXT)),
            (_issue, (out_ptr, turns, 3, TEXT)),
        ],
        [4, 4, 4],
        [120, 120, 120],
    )


def microseconds(out: torch.Tensor, products: int, turns: int, **constants: object) -> float:
    """Of one launch on all SMs, median of five."""

    def launch() -> None:
        _both[(this_machine().compute_units,)](out, products, turns, **constants, num_warps=4)

    launch()
    times, watch = [], Stopwatch()
    for _ in range(5):
        watch.start()
        launch()
        times.append(watch.stop() * 1e6)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--columns", default="64,128", help="of the product of 64 rows, comma-separated")
    given = parser.parse_args()
    if this_machine().arch != "sm90":
        parser.error(f"got a machine of {this_machine().arch}, wanted a Hopper GPU.")
    out = torch.ones(OUT, dtype=torch.int32, device="cuda")
    hertz = torch.cuda.get_device_properties(0).clock_rate * 1e3  # the highest; what it runs at is a little less
    for columns in map(int, given.columns.split(",")):
        products = 2000 * 64 // columns
        print(f"64 x {columns} x 64 products; hidden with W from registers, from shared memory")
        for name in KINDS:
            hidden = []
            for of_registers in (True, False):
                kind = {"TEXT": text_of(name), "COLUMNS": columns, "OF_REGISTERS": of_registers}
                alone = microseconds(out, products, 0, **kind)
                turns = round(1000 * alone / microseconds(out, 0, 1000, **kind))
                issued, both = microseconds(out, 0, turns, **kind), microseconds(out, products, turns, **kind)
                hidden.append((alone + issued - both) / min(alone, issued))
            rate = 2 * turns * REPEATED * REGISTERS.value / issued * 1e6 / hertz
            print(f"{name:>18}{rate:8.2f} a clock{hidden[0]:8.2f}{hidden[1]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
