"""`w4a16 eval`: a quantised model against its dense original on a text, in transformers or as vLLM serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .cli_serve import ENGINES, Model, need_vllm
from .errors import BadInput, explain_mismatch


def evaluate(
    quantized: Model,
    dense: Annotated[str, typer.Option(help="The dense original: a folder or a Hub id.")],
    text: Annotated[Path, typer.Option(help="A text file, UTF-8.")],
    window: Annotated[int, typer.Option(help="Tokens a forward pass sees.", min=2)] = 512,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens; 0 for the whole text.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Activations: auto (the model's), bfloat16, float16 or float32.")] = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    engine: Annotated[str, typer.Option(help="Serves the quantised model: transformers or vllm.")] = ENGINES[0],
) -> None:
    """Compare a quantised model with its dense original on a text."""
    if engine not in ENGINES:
        raise BadInput(explain_mismatch("--engine", got=engine, wanted=" or ".join(ENGINES), then="Name one of these."))
    if not text.is_file():
        raise BadInput(f"--text {text}: got no such file, wanted a UTF-8 text. Name one.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(quantized)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    run = _with_vllm if engine == "vllm" else _with_transformers
    figures = run(quantized, dense, ids[: max_tokens or None], window, device, dtype)
    table = Table("figure", "value", title=f"{quantized} against {dense}")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    if json_out is not None:
        json_out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _dense(model: str, device: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()


def _with_transformers(quantized: str, dense: str, ids: Any, window: int, device: str, dtype: str) -> dict[str, float]:
    from .api import load
    from .evaluate import compare

    loaded = load(quantized, device, dtype=dtype)
    return compare(_dense(dense, device, loaded.dtype), loaded, ids, window=window).as_dict()


def _with_vllm(quantized: str, dense: str, ids: Any, window: int, device: str, dtype: str) -> dict[str, float]:
    """The dense model in transformers first, gone before vLLM takes the memory."""
    need_vllm()
    from .plugins._vllm_eval import compare, score_transformers, score_vllm, windows

    chunks = windows(ids, window)
    original = score_transformers(_dense(dense, device, dtype), chunks)
    return compare(original, score_vllm(quantized, chunks, dtype=dtype)).as_dict()
