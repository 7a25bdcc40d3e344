"""Writes a checkpoint folder, streaming shards into a folder beside it that takes its name only when complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BadInput, OverBudget, explain_mismatch
from ..weight import QuantizedWeight
from .base import CHANNEL, Format, Scheme
from .reader import FORMATS, SIDE_FILES

SHARD_BYTES = 2 << 30
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
CONFIGS = ("quantization_config", "compression_config")


def write_checkpoint(
    out: str | Path,
    *,
    format: str,
    config: dict[str, Any],
    scheme: Scheme,
    items: Iterable[tuple[str, Tensor | QuantizedWeight]],
    ignore: Sequence[str] = (),
    extra_files_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `items`, each a dense tensor by its name or a QuantizedWeight by its module's, to the folder `out`.

    `scheme` says how the model is meant to be quantised; what the weights turn out to be goes into the configuration.
    `ignore` names the linear modules left dense. The tokenizer and generation files of `extra_files_from` are copied.
    `out` must not exist or be empty; when anything fails, nothing is left behind.
    """
    target = Path(out).absolute()
    writer = find_format(format)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(
            explain_mismatch(str(target), got="a path in use", wanted="a new folder", then="Choose another.")
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        found = _write_shards(partial, writer, scheme, items, ignore, shard_bytes)
        if extra_files_from is not None:
            _copy_extras(Path(extra_files_from), partial)
        clean = {key: value for key, value in config.items() if key not in CONFIGS}
        if isinstance(text := clean.get("text_config"), dict):
            clean["text_config"] = {key: value for key, value in text.items() if key not in CONFIGS}
        clean["quantization_config"] = writer.describe(scheme, found, ignore)
        _write_json(partial / "config.json", clean)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException as error:
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        shutil.rmtree(partial, ignore_errors=True)
        if _disk_full(error):
            free = shutil.disk_usage(target.parent).free
            raise OverBudget(
                f"{target}: got a full disk after {written / 1e6:.1f} MB, wanted room for the whole model. Nothing is "
                f"left behind; {free / 1e6:.1f} MB are free now. Free more, or write elsewhere."
            ) from error
        raise


def _disk_full(error: BaseException) -> bool:
    """Whether `error` says so, in Python's words or in those of safetensors, which keeps the number of the system's."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, SafetensorError) and any(f"os error {code}" in str(error) for code in FULL)


def find_format(name: str) -> type[Format]:
    if name not in FORMATS:
        then = "Choose one of these."
        raise BadInput(explain_mismatch("format", got=repr(name), wanted=" or ".join(FORMATS), then=then))
    return FORMATS[name]


def _write_shards(
    folder: Path,
    writer: type[Format],
    scheme: Scheme,
    items: Iterable[tuple[str, Tensor | QuantizedWeight]],
    ignore: Sequence[str],
    shard_bytes: int,
) -> dict[Scheme, list[str]]:
    found: dict[Scheme, list[str]] = {}
    files: list[dict[str, int]] = []  # the tensors of each shard and their bytes
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(shard, folder / f"{len(files)}", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    seen: set[str] = set()
    for name, item in items:
        if isinstance(item, QuantizedWeight):
            fact = _scheme_of(item, scheme)
            if fact not in found:
                # a mix that the format cannot hold is refused here, not after the last weight
                writer.describe(scheme, {**found, fact: [name]}, ignore)
            found.setdefault(fact, []).append(name)
            tensors = {f"{name}.{suffix}": part for suffix, part in writer.write(item, scheme).items()}
        else:
            tensors = {name: item}
        if again := seen & tensors.keys():
            raise BadInput(explain_mismatch(min(again), got="it twice", wanted="each tensor once", then="Drop one."))
        seen |= tensors.keys()
        size = sum(tensor.nbytes for tensor in tensors.values())
        if shard and size + sum(tensor.nbytes for tensor in shard.values()) > shard_bytes:
            flush()
        shard.update(_own(tensors, shard))
    flush()
    _name_shards(folder, files)
    return found


def _own(tensors: dict[str, Tensor], shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and each with memory of its own: safetensors refuses shared memory."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in shard.values()}
    owned = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        owned[name] = plain
    return owned


def _name_shards(folder: Path, files: list[dict[str, int]]) -> None:
    if len(files) == 1:
        (folder / "0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(files):
        name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{index}").rename(folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    total = sum(sum(tensors.values()) for tensors in files)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _scheme_of(weight: QuantizedWeight, meant: Scheme) -> Scheme:
    """What the weight is; where its group is the whole row, `meant` decides whether that is a group or a channel."""
    if weight.group == meant.group or (weight.group == weight.k and meant.group == CHANNEL):
        group = meant.group
    else:
        group = CHANNEL if weight.group == weight.k else weight.group
    return Scheme(group, weight.zeros is None, weight.perm is not None)


def _copy_extras(source: Path, folder: Path) -> None:
    skip = {"config.json", *SIDE_FILES}
    for path in source.iterdir():
        if (
            path.is_file()
            and path.name not in skip
            and not path.name.startswith(".")
            and not path.name.endswith(WEIGHTS)
        ):
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
