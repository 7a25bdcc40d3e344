"""What w4a16 keeps of a model: packed weights, dense copies of them, and why there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .nn import W4A16Experts, W4A16Linear, _Packed


@dataclass(frozen=True, kw_only=True)
class Line:
    """One packed weight: its bytes, those of its copy (0: none), and why there is a copy or none."""

    name: str
    n: int
    k: int
    layout: str
    packed_bytes: int
    copy_bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every packed weight of a model, and its bytes by kind: packed, dense copies, other tensors."""

    lines: tuple[Line, ...]
    bytes: dict[str, int]

    def __str__(self) -> str:
        width = max([len(line.name) for line in self.lines], default=0)
        rows = [
            f"{line.name:<{width}} {line.n:>6} x {line.k:<6} {line.layout:<8} {megabytes(line.packed_bytes)} packed, "
            f"{megabytes(line.copy_bytes)} copy: {line.why}"
            for line in self.lines
        ]
        return "\n".join([*rows, ", ".join(f"{kind} {megabytes(size)}" for kind, size in self.bytes.items())])


def report(model: nn.Module) -> Report:
    """What w4a16 keeps of `model`: which weights have a dense copy, which were refused one and why, bytes by kind."""
    lines = []
    sizes = Counter({"packed": 0, "dense copies": 0, "other": 0})
    ours: set[int] = set()
    for name, layer in _packed(model):
        weight = layer.get()
        copy = 0 if layer.dense is None else _storage_bytes(layer.dense)
        lines.append(
            Line(
                name=name,
                n=weight.n,
                k=weight.k,
                layout=weight.layout,
                packed_bytes=weight.nbytes,
                copy_bytes=copy,
                why=layer.dense_why if isinstance(layer, W4A16Linear) else "none: experts have no copies",
            )
        )
        sizes["packed"] += weight.nbytes
        sizes["dense copies"] += copy
        ours |= {id(buffer) for buffer in layer.buffers(recurse=False)}
    others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in ours}
    sizes["other"] = sum(tensor.nbytes for tensor in others.values())
    return Report(lines=tuple(lines), bytes=dict(sizes))


def _storage_bytes(copy: Tensor) -> int:
    return copy.shape[0] * copy.stride(0) * copy.element_size()


def _packed(model: nn.Module) -> Iterator[tuple[str, _Packed]]:
    """Linear and expert weights, in load order."""
    for name, module in model.named_modules():
        if isinstance(module, W4A16Linear) and module.codes is not None:
            yield name, module
        elif isinstance(module, W4A16Experts) and module.w13.codes is not None:
            yield from ((f"{name}.{half}", getattr(module, half)) for half in ("w13", "w2"))


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
