"""Loads a synthetic checkpoint of 8B size onto a GPU: time against reading its files and copying them, peak memory.

python benchmarks/loading.py [--format compressed-tensors] [--layers 32] [--device cuda] [--folder DIR] [--cold]

Each measurement runs in a process of its own, in turn, `--repeat` times, from the page cache or with --cold from the
disk; the median counts; what Python imports and the start of the driver are not timed. "read + copy" is what any
loader has to do: as many threads as ours, with as much pinned memory, read the files from end to end and have each
piece copied to the GPU while the next is read. "modules" reads, packs and keeps every layer; "transformers" is
`w4a16.load`, where there is transformers.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median
from threading import Thread

import torch
from torch import Tensor

import w4a16
from w4a16.api import pack_all
from w4a16.checkpoints import FORMATS, Scheme, open_checkpoint, write_checkpoint
from w4a16.checkpoints.pieces import PIECE_BYTES, Slot
from w4a16.checkpoints.shards import Files
from w4a16.checkpoints.stream import READERS, SLOTS, Stream
from w4a16.nn import W4A16Linear
from w4a16.weight import QuantizedWeight

HIDDEN, INTERMEDIATE, KV, VOCAB, GROUP = 4096, 14336, 1024, 128256, 128  # Llama 3 8B, its head tied
SHARD_BYTES = 1 << 30
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
IMPORTS = ("w4a16.plugins.transformers", "transformers.models.llama.modeling_llama")
GOAL = "goal: at most 1.3 x read + copy, at most packed + 1 GB"


def random_weight(n: int, k: int) -> QuantizedWeight:
    grid = (n, k // GROUP)
    return QuantizedWeight(
        codes=torch.randint(-(1 << 31), (1 << 31) - 1, (n, k // 8), dtype=torch.int32),
        scales=torch.rand(grid).mul(0.01).add(0.001).bfloat16(),
        zeros=torch.randint(0, 16, grid, dtype=torch.uint8),
        group=GROUP,
    )


def items(layers: int) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Every layer holds the same numbers, and the embedding one: loading does not look at them."""
    weights = {name: random_weight(*shape) for name, shape in SHAPES.items()}
    yield "model.embed_tokens.weight", torch.ones(VOCAB, HIDDEN, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(layers):
        for name, weight in weights.items():
            yield f"model.layers.{layer}.{name}", weight
        for name in NORMS:
            yield f"model.layers.{layer}.{name}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)


def make(folder: Path, form: str, layers: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    write_checkpoint(
        folder,
        format=form,
        config=config,
        scheme=Scheme(GROUP, False),
        items=items(layers),
        shard_bytes=SHARD_BYTES,
        ignore=["lm_head"],
    )


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def read_and_copy(folder: Path, device: torch.device) -> int:
    """Bytes that end up on the device."""
    files = sorted(folder.glob("*.safetensors"))
    sizes = {file: file.stat().st_size for file in files}
    kept = {file: torch.empty(size, dtype=torch.uint8, device=device) for file, size in sizes.items()}
    pieces = iter([(file, start) for file in files for start in range(0, sizes[file], PIECE_BYTES)])
    gpu = device.type == "cuda"

    def work() -> None:
        slots = [Slot(gpu) for _ in range(SLOTS)]
        copies = torch.Stream(device=device) if gpu else None
        with Files() as opened, copies or nullcontext():
            for slot, (file, start) in zip(cycle(slots), pieces, strict=False):
                slot.wait()
                size = opened.fill(slot.view, file, start)
                kept[file][start : start + size].copy_(slot.memory[:size], non_blocking=True)
                slot.copied = copies.record_event() if copies else None

    threads = [Thread(target=work) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finish(device)
    return sum(sizes.values())


def load_modules(folder: Path, device: torch.device) -> int:
    """Every layer as W4A16Linear, every other tensor as it is."""
    tensors: list[Tensor] = []
    layers: list[W4A16Linear] = []
    weights: list[QuantizedWeight] = []
    size = 0
    with open_checkpoint(folder) as checkpoint:
        dense, quantized = set(checkpoint.dense), checkpoint.quantized
        # the first weight takes 0.1 s in a new process, as CUDA loads the kernels; the embedding is read meanwhile
        names = [quantized[0], *checkpoint.dense, *quantized[1:]]
        with Stream(checkpoint, [(name, device) for name in names]) as stream:
            for name in names:
                if name in dense:
                    tensors.append(stream.tensor(name))
                    continue
                weights.append(stream.weight(name))
                if not stream.more:
                    packed = pack_all(weights, device=device, act=torch.bfloat16)
                    weights.clear()
                    layers += [W4A16Linear.of(one) for one in packed]
                    size += sum(one.nbytes for one in packed)
    finish(device)
    return size + sum(tensor.nbytes for tensor in tensors)


def load_transformers(folder: Path, device: torch.device) -> int:
    model = w4a16.load(str(folder), device, dtype=torch.bfloat16)
    finish(device)
    return sum(model.w4a16_report().bytes.values())


WORK: dict[str, Callable[[Path, torch.device], int]] = {
    "read + copy": read_and_copy,
    "modules": load_modules,
    "transformers": load_transformers,
}


def drop_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(what: str, folder: Path, device: torch.device) -> dict[str, float]:
    """Seconds, bytes kept, and the most that were taken at once."""
    peak = 0
    for module in IMPORTS if what == "transformers" else ():
        importlib.import_module(module)
    if device.type == "cuda":
        torch.zeros(1, device=device).sum().item()  # the driver's start belongs to no loader
        torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated() if device.type == "cuda" else 0, time.perf_counter()
    size = WORK[what](folder, device)
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": seconds, "bytes": size, "peak": peak}


def measured(what: str, folder: Path, device: torch.device) -> dict[str, float]:
    """The same in a process of its own, forked from one that has imported everything and started nothing."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(measure, (what, folder, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="compressed-tensors")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept, and found the next time")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--only", action="append", choices=WORK, help="beside read + copy; may be given twice")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "model"
        if not folder.exists():
            make(folder, args.format, args.layers)
        files = sorted(folder.glob("*.safetensors"))
        total = sum(file.stat().st_size for file in files)
        print(f"{args.format}, {args.layers} layers, {total / 1e9:.3f} GB in {len(files)} files; {GOAL}", flush=True)
        works = [what for what in WORK if what == "read + copy" or what in (args.only or WORK)]
        if "transformers" in works and find_spec("transformers") is None:
            print("transformers  is not installed")
            works.remove("transformers")
        preload = ["w4a16.nn", *(IMPORTS if "transformers" in works else ())]
        multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
        runs: dict[str, list[dict[str, float]]] = {what: [] for what in works}
        for _ in range(args.repeat):
            for what in works:
                if args.cold:
                    drop_cache(files)
                runs[what].append(measured(what, folder, torch.device(args.device)))
                print(f"{what:<13} {runs[what][-1]['seconds']:6.3f} s", flush=True)
        seconds = {what: [run["seconds"] for run in runs[what]] for what in works}
        medians = {what: median(seconds[what]) for what in works}
        for what in works:
            line = f"{what:<13} median {medians[what]:.3f} s ({min(seconds[what]):.3f} to {max(seconds[what]):.3f})"
            line += f", {total / medians[what] / 1e9:.2f} GB/s of files"
            if what != "read + copy":
                size = runs[what][0]["bytes"]
                line += f", {medians[what] / medians['read + copy']:.2f} x read + copy"
                if args.device != "cpu":
                    more = (max(run["peak"] for run in runs[what]) - size) / 1e9
                    line += f", resident {size / 1e9:.2f} GB, peak {more:+.2f} GB over it"
            print(line)


if __name__ == "__main__":
    main()
