"""Reads a synthetic checkpoint module by module, packs and keeps each: bytes a second, peak memory over packed size.

python benchmarks/reading.py [--gigabytes 1] [--format compressed-tensors] [--plain]

The reading runs in a process of its own, once from the disk and once from the page cache, so that its peak memory is
that of reading alone. Linux only: peak memory is VmHWM of /proc.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import w4a16
from w4a16.checkpoints import FORMATS, Scheme, open_checkpoint, write_checkpoint
from w4a16.weight import QuantizedWeight

SIZE = 4096
GROUP = 128
SHARD_BYTES = 256 << 20
LAYER_BYTES = SIZE * SIZE // 2 + SIZE * SIZE // GROUP * 3  # codes, 16-bit scales, 8-bit zero points


def random_weight(n: int, k: int) -> QuantizedWeight:
    grid = (n, k // GROUP)
    return QuantizedWeight(
        codes=torch.randint(-(1 << 31), (1 << 31) - 1, (n, k // 8), dtype=torch.int32),
        scales=torch.rand(grid).add(0.1).bfloat16(),
        zeros=torch.randint(0, 16, grid, dtype=torch.uint8),
        group=GROUP,
    )


def layers(count: int) -> Iterator[tuple[str, QuantizedWeight]]:
    for index in range(count):
        yield f"model.layers.{index}.proj", random_weight(SIZE, SIZE)


def memory(field: str) -> int:
    """VmRSS, the bytes resident now, or VmHWM, the most there ever were."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def read(folder: Path, plain: bool) -> None:
    w4a16.pack(random_weight(GROUP, GROUP))  # what is loaded at the first call is no cost of reading
    baseline, start = memory("VmRSS"), time.perf_counter()
    kept: list[object] = []
    size = 0
    with open_checkpoint(folder) as checkpoint:
        for module in checkpoint.quantized:
            weight = checkpoint.weight(module)
            if plain:
                kept.append(weight)
                size += sum(t.nbytes for t in (weight.codes, weight.scales, weight.zeros) if t is not None)
            else:
                packed = w4a16.pack(weight)
                kept.append(packed)
                size += packed.nbytes
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - baseline
    print(
        f"{len(kept)} modules, {size / 1e9:.3f} GB packed, {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s, "
        f"peak {peak / 1e9:.3f} GB = {peak / size:.3f} x packed"
    )


def drop_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--format", choices=FORMATS, default="compressed-tensors")
    parser.add_argument("--plain", action="store_true", help="keep the plain weight, without packing it")
    parser.add_argument("--read", type=Path, help="only read this folder, in this process")
    args = parser.parse_args()
    if args.read:
        return read(args.read, args.plain)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        count = max(1, round(args.gigabytes * 1e9 / LAYER_BYTES))
        write_checkpoint(
            folder,
            format=args.format,
            config={},
            scheme=Scheme(GROUP, False),
            items=layers(count),
            shard_bytes=SHARD_BYTES,
        )
        command = [sys.executable, __file__, "--read", str(folder), *(["--plain"] if args.plain else [])]
        print(f"{args.format}, {count} layers of {SIZE}x{SIZE} in {len(list(folder.glob('*.safetensors')))} shards")
        for source in ("disk ", "cache"):
            if source == "disk ":
                drop_cache(folder)
            print(source, end=": ", flush=True)
            subprocess.run(command, check=True)
    return None


if __name__ == "__main__":
    main()
