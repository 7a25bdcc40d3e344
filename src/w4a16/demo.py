"""The main job, whole, on the shipped tiny models: quantise, save in every format, load, generate, compare, time."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
PROMPT_TOKENS, NEW_TOKENS, EVAL_TOKENS, REPEATS = 64, 32, 2048, 3


def run(models: Path, work: Path, console: Console) -> None:
    """Runs the demo; raises W4A16Error when a quantised model does not generate what its dequantised self does."""
    names = sorted(path.parent.name for path in models.glob("*/config.json"))
    text = models / "heldout.txt"
    if not names or not text.is_file():
        raise BadInput(f"--models {models}: got no model folder with heldout.txt beside it. Run from the repository.")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with _no_progress_bars():
        for name in names:
            _demo_model(name, models / name, text.read_text(encoding="utf-8"), work, console)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _demo_model(name: str, source: Path, text: str, work: Path, console: Console) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt", verbose=False).input_ids[0]
    prompt, ids = ids[None, :PROMPT_TOKENS], ids[:EVAL_TOKENS]
    quality = Table("weights", "format", "same tokens", "perplexity", "KL per token", "top-1 agreement")
    speed = Table("weights", "MB", "TTFT ms", "TPOT ms", "prefill by", "decode by")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for label, group, symmetric in SCHEMES:
        folders = {f: work / f"{name}-{label.replace(' ', '-')}-{f}" for f in FORMATS}
        quantize_model(source, folders[FORMATS[0]], group=group, symmetric=symmetric)
        for target in FORMATS[1:]:
            convert(folders[FORMATS[0]], folders[target], to=target)
        for target, folder in folders.items():
            # fp32 activations: no near-tie of bf16 hides a difference, and dense bf16 is slow on many CPUs
            model = load(str(folder), dtype=torch.float32)
            _check_tokens(model, folder, source, prompt)
            found = compare(dense, model, ids)
            if not quality.rows:
                quality.add_row("bf16", "dense", "", f"{found.perplexity_dense:.3f}", "", "")
            quality.add_row(
                label,
                target,
                f"{NEW_TOKENS} of {NEW_TOKENS}",
                f"{found.perplexity_quantized:.3f}",
                f"{found.kl_per_token:.4f}",
                f"{found.top1_agreement:.1%}",
            )
        if not speed.rows:
            original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
            speed.add_row("bf16", *_speed(original, prompt), "torch", "torch")
        model = load(str(folders[FORMATS[0]]), dtype=torch.bfloat16)
        speed.add_row(label, *_speed(model, prompt), *_kernels(model, prompt))
    quality.title = f"{name}: {len(ids)} tokens of held-out text"
    speed.title = f"{name}: prompt of {PROMPT_TOKENS} tokens, bf16 activations"
    console.print(quality)
    console.print(speed)


def _greedy(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
    return out[0, prompt.shape[1] :]


def _check_tokens(model: nn.Module, folder: Path, source: Path, prompt: Tensor) -> None:
    """The int4 kernels against the dense model of the dequantised weights, token for token."""
    from transformers import AutoModelForCausalLM

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


def _speed(model: nn.Module, prompt: Tensor) -> tuple[str, str, str]:
    """Megabytes of all tensors, and medians of the time to the first token and of that for each one after it."""
    first, each = [], []
    for _ in range(REPEATS + 1):  # the first round warms up
        started = time.perf_counter()
        _greedy(model, prompt, 1)
        middle = time.perf_counter()
        _greedy(model, prompt, NEW_TOKENS)
        first.append(middle - started)
        each.append((time.perf_counter() - middle - first[-1]) / (NEW_TOKENS - 1))
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    ttft, tpot = statistics.median(first[1:]) * 1e3, statistics.median(each[1:]) * 1e3
    return f"{sum(tensors.values()) / 1e6:.2f}", f"{ttft:.1f}", f"{tpot:.2f}"


def _kernels(model: nn.Module, prompt: Tensor) -> tuple[str, str]:
    """The kernels that served the prompt, and those that served the next token."""
    with record() as served:
        _greedy(model, prompt, 2)
    rows = max(problem.m for _, problem in served)

    def names(prefill: bool) -> str:
        return ", ".join(sorted({stem for stem, problem in served if (problem.m == rows) == prefill}))

    return names(True), names(False)
