"""`w4a16 profile`: a model's speed in transformers, and each operation of prefill and decode against its bound."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BadInput, explain_mismatch
from .problem import ACT_NAMES

_NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in ACT_NAMES}


def profile(
    model: Annotated[str, typer.Argument(help="A checkpoint folder or Hub id; with --random a size or a config.json.")],
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 512,
    output_len: Annotated[int, typer.Option(help="New tokens of each sequence.", min=2)] = 32,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    random: Annotated[bool, typer.Option("--random", help="Random 4-bit weights, made on the device.")] = False,
    group_size: Annotated[int, typer.Option(help="Of --random: columns that share a scale.")] = 128,
    asym: Annotated[bool, typer.Option("--asym", help="Of --random: with zero points.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="The same model with dense weights beside it.")] = False,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Activations: auto (the model's), bfloat16, float16 or float32.")] = "auto",
    by: Annotated[str, typer.Option(help="What makes a row: op, shape, kernel or layer.")] = "shape",
    top: Annotated[int, typer.Option(help="Rows to print.")] = 16,
    steps: Annotated[int, typer.Option(help="Decode steps in the trace.", min=1)] = 4,
    repeats: Annotated[int, typer.Option(help="Generations to time.", min=1)] = 3,
    trace: Annotated[Path | None, typer.Option(help="Keep the trace: OUT.json.gz.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report of the whole trace as a page.")] = None,
) -> None:
    """Time a model's prefill and decode, record a trace of both, and report each operation against its bound."""
    import torch

    from .roofline.models import dense_twin

    if by not in ("op", "shape", "kernel", "layer"):
        raise BadInput(explain_mismatch("--by", got=by, wanted="op, shape, kernel or layer", then="Name one of these."))
    torch.manual_seed(0)
    loaded = _random(model, device, dtype, group_size, asym) if random else _loaded(model, device, dtype)

    @torch.inference_mode()
    def show(served: Any, title: str, suffix: str) -> float:
        return _profile_one(
            served,
            title,
            sizes=(batch, prompt_len, output_len),
            record=(min(steps, output_len - 1), repeats, by, top),
            trace=_beside(trace, suffix),
            html=_beside(html, suffix),
        )

    tokens = show(loaded, model, "")
    if dense:
        twin = dense_twin(loaded)
        del loaded
        other = show(twin, f"{model}, dense", "-dense")
        print(f"\n{model} is {tokens / other:.2f} times as fast as with dense weights, by tokens/s")


def _beside(path: Path | None, suffix: str) -> Path | None:
    """out-dense.json.gz of out.json.gz."""
    if path is None:
        return None
    stem, dot, rest = path.name.partition(".")
    return path.with_name(f"{stem}{suffix}{dot}{rest}")


def _dtype(name: str, auto: Any) -> Any:
    if name == "auto":
        return auto
    if name not in _NAMED:
        wanted = f"auto, {', '.join(_NAMED)}"
        raise BadInput(explain_mismatch("--dtype", got=name, wanted=wanted, then="Name one of these."))
    return _NAMED[name]


def _random(model: str, device: str, dtype: str, group: int, asym: bool) -> Any:
    import torch

    from .roofline.models import config_of, random_model

    act = _dtype(dtype, torch.bfloat16)
    return random_model(config_of(model), torch.device(device), act, group=group, symmetric=not asym)


def _loaded(model: str, device: str, dtype: str) -> Any:
    """The model on w4a16's layers where its checkpoint is quantised; else as transformers loads it."""
    from transformers import AutoModelForCausalLM

    from .api import load
    from .plugins.transformers import config_dict

    act = _dtype(dtype, "auto")
    if config_dict(model).get("quantization_config") is not None:
        return load(model, device, dtype=act)
    return AutoModelForCausalLM.from_pretrained(model, dtype=act).to(device).eval()


def _profile_one(
    model: Any,
    title: str,
    *,
    sizes: tuple[int, int, int],
    record: tuple[int, int, str, int],
    trace: Path | None,
    html: Path | None,
) -> float:
    """Prints one model's speed and reports; its tokens a second."""
    from .roofline.command import bounds_of
    from .roofline.models import Prompted
    from .roofline.page import as_html
    from .roofline.record import record_generation, time_generation
    from .roofline.report import make_report
    from .roofline.scopes import layers
    from .roofline.step import step_of
    from .roofline.tables import as_table
    from .roofline.trace import read

    (batch, prompt, output), (steps, repeats, by, top) = sizes, record
    generation = Prompted(model, batch, prompt)
    where = model.device
    speed = time_generation(generation, batch=batch, prompt=prompt, output=output, where=where, repeats=repeats)
    print(f"{title}: {speed.sentence()}")
    with tempfile.TemporaryDirectory() as folder:
        path = trace or Path(folder, "trace.json.gz")
        inside = layers(model) if by == "layer" else None
        record_generation(generation, path, where=where, steps=steps, layers=inside)
        recorded = read(path)
    bounds, step = bounds_of(recorded), step_of(recorded)
    for phase in ("prefill", "decode"):
        report = make_report(recorded, step, bounds, by=by, phase=phase)
        print(f"\n{as_table(report, top)}")
    if html is not None:
        html.write_text(as_html(make_report(recorded, step, bounds, by=by)), encoding="utf-8")
    return speed.tokens_per_s
