"""The main job, whole, on the shipped tiny models: quantise, save in every format, load, generate, compare, time."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .api import load
from .checkpoints import Checkpoint, convert, open_checkpoint
from .dispatch import record
from .errors import BadInput, W4A16Error
from .evaluate import compare
from .quantize import quantize_model

SCHEMES = (("sym g128", 128, True), ("asym g32", 32, False))
FORMATS = ("compressed-tensors", "awq", "gptq")
PROMPT_TOKENS, NEW_TOKENS, EVAL_TOKENS, REPEATS = 128, 32, 4096, 3


def run(models: Path, work: Path, console: Console) -> None:
    """Runs the demo; raises W4A16Error when a quantised model does not generate what its dequantised self does."""
    names = sorted(path.parent.name for path in models.glob("*/config.json"))
    text = models / "heldout.txt"
    if not names or not text.is_file():
        raise BadInput(f"--models {models}: got no model folder with heldout.txt beside it. Run from the repository.")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in names:
        _demo_model(name, models / name, text.read_text(encoding="utf-8"), work, console)


def _demo_model(name: str, source: Path, text: str, work: Path, console: Console) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt", verbose=False).input_ids[0]
    prompt, ids = ids[None, :PROMPT_TOKENS], ids[:EVAL_TOKENS]
    table = Table("weights", "format", "same tokens", "perplexity", "KL/token", "top-1", "MB", "TTFT ms", "TPOT ms")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    kernels: dict[str, tuple[str, str]] = {}
    for number, (label, group, symmetric) in enumerate(SCHEMES):
        folders = {f: work / f"{name}-{label.replace(' ', '-')}-{f}" for f in FORMATS}
        quantize_model(source, folders[FORMATS[0]], group=group, symmetric=symmetric)
        for target in FORMATS[1:]:
            convert(folders[FORMATS[0]], folders[target], to=target)
        for target, folder in folders.items():
            _check_tokens(folder, source, prompt)
            model = load(str(folder), dtype=torch.bfloat16)
            figures = compare(dense, model, ids)
            if number == 0 and target == FORMATS[0]:
                times = _timings(dense, prompt)
                table.add_row("bf16", "dense", "", f"{figures.perplexity_dense:.3f}", "", "", *_cells(dense, times))
            table.add_row(
                label,
                target,
                f"{NEW_TOKENS} of {NEW_TOKENS}",
                f"{figures.perplexity_quantized:.3f}",
                f"{figures.kl_per_token:.4f}",
                f"{figures.top1_agreement:.1%}",
                *_cells(model, _timings(model, prompt)),
            )
            kernels[label] = _kernels(model, prompt)
    table.title = f"{name}: {len(ids)} tokens of held-out text, prompt of {PROMPT_TOKENS}"
    console.print(table)
    for label, (prefill, decode) in kernels.items():
        console.print(f"  {label}: prefill by {prefill}; decode by {decode}")


def _greedy(model: nn.Module, prompt: Tensor, tokens: int) -> Tensor:
    with torch.inference_mode():
        generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
        return generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )[0, prompt.shape[1] :]


def _check_tokens(folder: Path, source: Path, prompt: Tensor) -> None:
    """In fp32 activations, where no near-tie hides: int4 kernels against the dense model of the dequantised weights."""
    from transformers import AutoModelForCausalLM

    model = load(str(folder), dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with open_checkpoint(folder) as checkpoint:
        fill_dense(dense, checkpoint)
    got, wanted = _greedy(model, prompt, NEW_TOKENS), _greedy(dense, prompt, NEW_TOKENS)
    if not torch.equal(got, wanted):
        raise W4A16Error(
            f"{folder}: got tokens {got.tolist()}, wanted {wanted.tolist()} as its dequantised self gives."
        )


def fill_dense(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Puts the dequantised weights of a quantised checkpoint into a dense model of the same structure."""
    inside = tuple(f"{prefix}." for prefix in checkpoint.expert_prefixes)
    with torch.no_grad():
        for name in checkpoint.quantized:
            if not name.startswith(inside or ("\0",)):
                linear = model.get_submodule(name)
                assert isinstance(linear.weight, Tensor)
                linear.weight.copy_(checkpoint.weight(name).dequantize(torch.float32))
        for prefix in checkpoint.expert_prefixes:
            block = model.get_submodule(prefix)
            for parameter, weight in zip(("gate_up_proj", "down_proj"), checkpoint.experts(prefix), strict=True):
                getattr(block, parameter).copy_(weight.dequantize(torch.float32))


def _timings(model: Any, prompt: Tensor) -> tuple[float, float]:
    """Medians, in ms: time to first token, and time per output token after it."""
    first, each = [], []
    for _ in range(REPEATS + 1):  # the first round warms up
        started = time.perf_counter()
        _greedy(model, prompt, 1)
        middle = time.perf_counter()
        _greedy(model, prompt, NEW_TOKENS)
        first.append(middle - started)
        each.append((time.perf_counter() - middle - first[-1]) / (NEW_TOKENS - 1))
    return statistics.median(first[1:]) * 1e3, statistics.median(each[1:]) * 1e3


def _cells(model: nn.Module, times: tuple[float, float]) -> tuple[str, str, str]:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return f"{sum(tensors.values()) / 1e6:.2f}", f"{times[0]:.1f}", f"{times[1]:.2f}"


def _kernels(model: nn.Module, prompt: Tensor) -> tuple[str, str]:
    """The kernels that served the prompt, and those that served the next token."""
    with record() as served:
        _greedy(model, prompt, 2)
    rows = max(problem.m for _, problem in served)

    def names(prefill: bool) -> str:
        return ", ".join(sorted({stem for stem, problem in served if (problem.m == rows) == prefill}))

    return names(True), names(False)
