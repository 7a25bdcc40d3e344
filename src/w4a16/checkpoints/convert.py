"""Rewrites a quantised checkpoint in another format, code for code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from torch import Tensor

from ..errors import Unsupported
from ..weight import QuantizedWeight
from .base import CHANNEL, Scheme
from .reader import FORMATS, Checkpoint, open_checkpoint
from .writer import find_format, write_checkpoint


def convert(src: str | Path, dst: str | Path, to: str, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Writes the quantised checkpoint `src` to `dst` in the format `to`, code for code.

    Raises Unsupported when `to` cannot hold it. `progress` is told (done, total) after every module and tensor.
    """
    find_format(to)
    with open_checkpoint(src) as checkpoint:
        if checkpoint.format is None:
            raise Unsupported(
                f"{checkpoint.path}: got a model that is not quantised, wanted {' or '.join(FORMATS)}. "
                "Run `w4a16 quantize` on it."
            )
        names = [*checkpoint.dense, *checkpoint.quantized]

        def items() -> Iterable[tuple[str, Tensor | QuantizedWeight]]:
            quantized = set(checkpoint.quantized)
            for done, name in enumerate(names):
                yield name, checkpoint.weight(name) if name in quantized else checkpoint.tensor(name)
                if progress is not None:
                    progress(done + 1, len(names))

        schemes = [checkpoint.plan(module).scheme for module in checkpoint.quantized]
        write_checkpoint(
            dst,
            format=to,
            config=checkpoint.config,
            scheme=max(schemes, key=schemes.count, default=Scheme(CHANNEL, True)),
            items=items(),
            ignore=dense_modules(checkpoint),
            extra_files_from=checkpoint.path,
        )


def dense_modules(checkpoint: Checkpoint, quantize: Collection[str] = ()) -> list[str]:
    """Modules that may be Linear and hold a dense weight, those of `quantize` (names of tensors) apart.

    A router is Linear to some engines and not to others; naming it does no harm, nor does naming an embedding.
    """
    dense = [name for name in checkpoint.dense if name not in quantize]
    weights = [name for name in dense if name.endswith(".weight") and len(checkpoint.shape(name)) == 2]
    names = [name.removesuffix(".weight") for name in weights]
    if not any(name.rpartition(".")[2] == "lm_head" for name in (*names, *checkpoint.quantized)):
        names.append("lm_head")  # tied to the embedding: in no file, and yet a Linear
    return names
