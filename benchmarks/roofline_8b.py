"""A decoder of Qwen3-8B's sizes in plain torch, its weights random: W4A16 and dense side by side, against their bounds.

    python benchmarks/roofline_8b.py [--batches 1,16] [--prompt 2048] [--layers 36] [--traces FOLDER]

Prints, for each kind of weight: time to the first token, time for each one after it (eager, and as a CUDA graph), and
the roofline of prefill and decode. The prompt is of one sequence; decode runs `batch` sequences of that context. Every
decode step writes and reads the same position, the first after the prompt, so that a graph of it can be replayed. Needs
a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w4a16.api import pack
from w4a16.bench.cases import Shape
from w4a16.bench.run import random_weight
from w4a16.device import Graph, Stopwatch, session_facts
from w4a16.nn import W4A16Linear
from w4a16.roofline.command import bounds_of
from w4a16.roofline.record import record_generation, time_generation
from w4a16.roofline.report import make_report
from w4a16.roofline.step import step_of
from w4a16.roofline.tables import as_table
from w4a16.roofline.trace import read

WHERE = torch.device("cuda")
ACT = torch.bfloat16
Make = Callable[[int, int], nn.Module]  # out features, in features


@dataclass(frozen=True, kw_only=True)
class Sizes:
    hidden: int = 4096
    intermediate: int = 12288
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 151936


class Layer(nn.Module):
    """One decoder layer over its own keys and values [batch, kv_heads, positions, head]."""

    def __init__(self, sizes: Sizes, make: Make, cache: Tensor):
        super().__init__()
        self.sizes, self.cache = sizes, cache
        self.qkv = make((sizes.heads + 2 * sizes.kv_heads) * sizes.head, sizes.hidden)
        self.o = make(sizes.hidden, sizes.heads * sizes.head)
        self.gate_up = make(2 * sizes.intermediate, sizes.hidden)
        self.down = make(sizes.hidden, sizes.intermediate)
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.hidden) for _ in range(2))
        self.head_norms = nn.ModuleList(nn.RMSNorm(sizes.head) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        q, k, v = self.projected(x, cos, sin)
        end = start + x.shape[1]
        keys, values = self.cache[0, : len(x), :, :end], self.cache[1, : len(x), :, :end]
        keys[:, :, start:], values[:, :, start:] = k, v
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=x.shape[1] > 1, enable_gqa=True)
        return self.finished(x, out)

    def projected(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [batch, heads, tokens, head] of x [batch, tokens, hidden]."""
        s = self.sizes
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (-1, s.head))
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 2)
        q, k = rotated(self.head_norms[0](q), cos, sin), rotated(self.head_norms[1](k), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def finished(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, from its input and what its attention gave."""
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def fuse(self) -> None:
        """torch.compile on both sides of the attention. Not on the cache: compiled slices of it are copied whole."""
        options = {"fullgraph": True, "dynamic": False}
        self.projected, self.finished = (torch.compile(f, **options) for f in (self.projected, self.finished))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [batch, tokens, heads, head], cos and sin [tokens, 1, head]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes, make: Make, make_head: Make, *, batch: int, positions: int):
        super().__init__()
        where = {"device": WHERE, "dtype": ACT}
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden, **where)
        shape = (2, batch, sizes.kv_heads, positions, sizes.head)
        with WHERE:
            self.layers = nn.ModuleList(Layer(sizes, make, torch.randn(shape, **where)) for _ in range(sizes.layers))
            self.norm = nn.RMSNorm(sizes.hidden)
        self.to(ACT)
        self.lm_head = make_head(sizes.vocabulary, sizes.hidden)
        angles = torch.outer(torch.arange(positions), 1e6 ** (-torch.arange(0, sizes.head, 2) / sizes.head))
        self.cos, self.sin = (f(torch.cat((angles, angles), -1))[:, None].to(**where) for f in (torch.cos, torch.sin))

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        """The next token [batch, 1] of tokens [batch, n] at positions start, start + 1, ..."""
        x, end = self.embedding(tokens), start + tokens.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[start:end], self.sin[start:end], start)
        return self.lm_head(self.norm(x[:, -1:])).argmax(-1)


class Steps:
    """The generation that is timed and recorded: a prompt of one sequence, decode steps of `batch`."""

    def __init__(self, model: Decoder, batch: int, prompt: int):
        self.model, self.start = model, prompt
        self.prompt = torch.randint(0, model.embedding.num_embeddings, (1, prompt), device=WHERE)
        self.last = torch.randint(0, model.embedding.num_embeddings, (batch, 1), device=WHERE)

    def prefill(self) -> None:
        self.model(self.prompt, 0)

    def decode(self) -> None:
        self.last.copy_(self.model(self.last, self.start))


class Replayed:
    """The same with its decode step as a CUDA graph."""

    def __init__(self, steps: Steps):
        self.prefill, self.decode = steps.prefill, Graph(steps.decode).replay


def int4(n: int, k: int) -> nn.Module:
    weight = random_weight(Shape(name="", n=n, k=k), act="bf16", has_zeros=False, device=WHERE)
    return W4A16Linear.of(pack(weight, device=WHERE))


def dense(n: int, k: int) -> nn.Module:
    layer = nn.Linear(k, n, bias=False, device=WHERE, dtype=ACT)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


# What makes the layers' weights, and what the output embedding's.
WEIGHTS: dict[str, tuple[Make, Make]] = {"w4a16": (int4, dense), "w4a16-head": (int4, int4), "dense": (dense, dense)}


def gpu_us(steps: Steps | Replayed, count: int = 20) -> float:
    """Microseconds of a decode step in a row of many, by the GPU's clock."""
    watch = Stopwatch()
    steps.decode()
    watch.start()
    for _ in range(count):
        steps.decode()
    return watch.stop() * 1e6 / count


def show(name: str, path: Path, phase: str, by: str, steps: int, by_clock: float | None) -> None:
    """The roofline of one phase; and its operations' sum beside the step's time as timed without a profiler."""
    trace = read(path)
    report = make_report(trace, step_of(trace), bounds_of(trace), by=by, phase=phase)
    print(f"\n--- {name}, {phase}\n{as_table(report, 14)}")
    usage, rows = report.step.usage, sum(row.us for row in report.rows)
    print(f"sum of rows {rows:.1f} us, GPU busy {usage.busy:.1f} us: {100 * (rows / usage.busy - 1):+.2f} %")
    if by_clock is not None:
        per_step = rows / steps
        print(f"rows of a step {per_step:.1f} us; unrecorded, by the GPU's clock {by_clock:.1f} us: ", end="")
        print(f"{100 * (per_step / by_clock - 1):+.2f} %")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--batches", default="1,16")
    p.add_argument("--prompt", type=int, default=2048)
    p.add_argument("--layers", type=int, default=36)
    p.add_argument("--weights", default="w4a16,dense", help="w4a16-head: the output embedding in 4 bits too")
    p.add_argument("--compile", action="store_true", help="torch.compile on what is around the products")
    p.add_argument("--by", default="shape", help="what makes a row")
    p.add_argument("--steps", type=int, default=4, help="decode steps in a trace")
    p.add_argument("--traces", type=Path, help="keep the traces in this folder")
    options = p.parse_args()
    torch.manual_seed(0)
    print(session_facts())
    batches = [int(batch) for batch in options.batches.split(",")]
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = options.traces or Path(temporary)
        for weights in options.weights.split(","):
            sizes = Sizes(layers=options.layers)
            model = Decoder(sizes, *WEIGHTS[weights], batch=max(batches), positions=options.prompt + 8)
            if options.compile:
                for layer in model.layers:
                    layer.fuse()
            for batch in batches:
                one_batch(model, weights, batch, options, folder)
            del model
            torch.cuda.empty_cache()


def one_batch(model: Decoder, weights: str, batch: int, options: argparse.Namespace, folder: Path) -> None:
    eager = Steps(model, batch, options.prompt)
    replayed = Replayed(eager)
    for name, steps, warm_up in (("eager", eager, None), ("graph", replayed, eager.decode)):
        speed = time_generation(steps, batch=batch, prompt=options.prompt, output=33, where=WHERE)
        title = f"{weights}{', compiled' if options.compile else ''}, batch {batch}, {name}"
        print(
            f"\n=== {title}: TTFT of one sequence {speed.ttft * 1e3:.2f} ms, TPOT {speed.tpot * 1e3:.3f} ms, ", end=""
        )
        print(f"{batch / speed.tpot:.0f} tokens/s", flush=True)
        compiled = "-compiled" if options.compile else ""
        path = folder / f"8b-{weights}{compiled}-{batch}-{name}.json.gz"
        record_generation(steps, path, where=WHERE, steps=options.steps, warm_up=warm_up)
        if name == "eager" and batch == 1:
            show(title, path, "prefill", options.by, 1, None)
        show(title, path, "decode", options.by, options.steps, gpu_us(steps))


if __name__ == "__main__":
    main()
