"""The `w4a16` command: parse and delegate (extra `cli`). A W4A16Error ends it with its message and status 1."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .cli_eval import evaluate
from .cli_isa import isa, isa_golden
from .cli_profile import profile
from .cli_report import report
from .cli_serve import PASS_ON, serve, serve_bench
from .cli_verify import verify
from .errors import W4A16Error

app = typer.Typer(add_completion=False, no_args_is_help=True, help="4-bit weights, 16-bit activations.")
console = Console()

FORMAT_HELP = "compressed-tensors, awq or gptq"
Model = Annotated[str, typer.Argument(help="A checkpoint folder or a Hugging Face Hub id.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ...")]
DtypeOption = Annotated[str, typer.Option(help="Activations: auto (the model's), bfloat16, float16 or float32.")]


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


@app.command()
def demo(
    models: Annotated[Path, typer.Option(help="The folder that holds the shipped tiny models.")] = Path("models"),
    work: Annotated[Path, typer.Option(help="Where the quantised copies go; made anew.")] = Path(".demo"),
) -> None:
    """Quantise the shipped models, save, load and compare them in every format."""
    from .demo import run

    run(models, work, console)


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="A dense checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1 for whole rows.")] = 128,
    asym: Annotated[bool, typer.Option("--asym", help="With zero points.")] = False,
    format: Annotated[str, typer.Option(help=FORMAT_HELP)] = "compressed-tensors",
) -> None:
    """Quantise the Linear layers and experts of any causal LM to 4 bits, without data."""
    from .quantize import quantize_model

    with progress_bar() as bar:
        task = bar.add_task("quantise", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        plan = quantize_model(model, out, group=group_size, symmetric=not asym, format=format, progress=show)
        bar.update(task, completed=1, total=1, description="quantised")
    console.print(f"{len(plan.linear) + len(plan.fused_experts)} weights in 4 bits, written to {out}")
    for name, why in plan.left_dense:
        console.print(f"  left dense: {name} ({why})")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A W4A16 checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    to: Annotated[str, typer.Option(help=FORMAT_HELP)] = "compressed-tensors",
) -> None:
    """Write a quantised checkpoint in another format; the codes stay as they are."""
    from .checkpoints import convert as convert_checkpoint

    convert_checkpoint(source, out, to=to)
    console.print(f"{source} written to {out} as {to}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def ",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample, not greedy.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
) -> None:
    """Stream a continuation of --prompt."""
    from transformers import TextStreamer

    loaded, tokenizer = load_with_tokenizer(model, device, dtype)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    streamer = TextStreamer(tokenizer)
    loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample, streamer=streamer)


@app.command()
def explain(
    m: Annotated[int, typer.Option(help="Rows of x: tokens in this call.")],
    n: Annotated[int, typer.Option(help="Out features (experts: of the first GEMM).")],
    k: Annotated[int, typer.Option(help="In features (experts: hidden).")],
    group: Annotated[int, typer.Option(help="Columns that share a scale; -1 for whole rows.")] = 128,
    act: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "bf16",
    asym: Annotated[bool, typer.Option("--asym", help="With zero points.")] = False,
    experts: Annotated[int, typer.Option(help="Experts of the layer; 0 for a linear layer.")] = 0,
    top_k: Annotated[int, typer.Option(help="Experts a token goes to.")] = 0,
    device: Annotated[str, typer.Option(help="A known device, such as gfx1151 or sm90; default this machine.")] = "",
) -> None:
    """Which kernel serves a problem on a device, and why each other one does not."""
    from .dense_cache import describe_copy
    from .device import known_device, this_machine
    from .dispatch import explanation
    from .problem import Problem
    from .tuning.table import row_for

    problem = Problem(
        m=m,
        n=n,
        k=k,
        group=k if group == -1 else group,
        act=act,
        has_zeros=asym,
        experts=experts,
        top_k=top_k,
    )
    where = known_device(device) if device else this_machine()
    found = explanation(problem, where)
    table = Table(
        "kernel", "what it is", "answer", title=f"{problem.op} m={m} n={n} k={k} on {where.arch} ({where.model})"
    )
    for line in found.lines:
        table.add_row(line.stem, line.does, f"[green]{line.answer}[/]" if line.wins else line.answer)
    console.print(table)
    if found.choice is None:
        console.print(f"No kernel serves this on {where.arch}.")
        raise typer.Exit(1)
    console.print(f"layout {found.choice.layout}, kernel {found.choice.row.stem}, tile {found.choice.tile or 'none'}")
    if found.choice.tile is not None:
        row = row_for(found.choice.row.stem, problem, where)
        console.print(f"from row {row.place} of tuning/{row.table}.toml: {row.why} ({row.measured})")
    if problem.op == "linear":
        console.print(f"dense copy: {describe_copy(problem, where)}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Time kernels and their peers, after checking them; `w4a16 bench --help` lists the options.",
)
def bench(context: typer.Context) -> None:
    from .bench.command import main as run_bench

    raise typer.Exit(run_bench(context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="The speed gate: `w4a16 golden check` or `update`; `w4a16 golden --help` lists the options.",
)
def golden(context: typer.Context) -> None:
    from .bench.gate import main as run_gate

    raise typer.Exit(run_gate(context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Time tiles of one kernel here and print the best; `w4a16 tune --help` lists the options.",
)
def tune(context: typer.Context) -> None:
    from .tuning.search import main as run_search

    raise typer.Exit(run_search(context.args))


app.command(name="eval")(evaluate)
app.command(context_settings=PASS_ON)(serve)
app.command(name="serve-bench", context_settings=PASS_ON)(serve_bench)
app.command()(isa)
app.command(name="isa-golden")(isa_golden)
app.command()(verify)
app.command()(report)
app.command()(profile)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Measure this machine's peaks beside the published ones; `w4a16 device --help` lists the options.",
)
def device(context: typer.Context) -> None:
    from .cli_device import main as run_device

    raise typer.Exit(run_device(context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Each operation of a profiler trace against its bound; `w4a16 roofline --help` lists the options.",
)
def roofline(context: typer.Context) -> None:
    from .roofline.command import main as run_roofline

    raise typer.Exit(run_roofline(context.args))


def load_with_tokenizer(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The quantised model and its tokenizer."""
    from transformers import AutoTokenizer

    from .api import load

    return load(model, device, dtype=dtype), AutoTokenizer.from_pretrained(model)


def main() -> None:
    try:
        app()
    except W4A16Error as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}[/]: ", end="")
        print(error, file=sys.stderr)
        sys.exit(1)
