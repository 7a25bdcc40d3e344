"""Opens a checkpoint folder: what is in it, checked from the headers; then any module or tensor, one at a time."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..errors import BadInput, explain_mismatch
from ..weight import QuantizedWeight
from .awq import Awq
from .base import Fields, Format, Parts, Plan
from .compressed_tensors import CompressedTensors
from .experts import EXPERT, Expert, Source, expert_modules, stack
from .gptq import Gptq
from .shards import Entry, Files, bad, read_entries, read_json

FORMATS: dict[str, type[Format]] = {each.name: each for each in (Awq, Gptq, CompressedTensors)}
# where tools older than `quantization_config` in config.json left theirs
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
CODES = tuple({each.suffixes[0] for each in FORMATS.values()})


class Checkpoint:
    """An opened folder: headers, configuration and shapes are checked, values when they are read.

    format      "awq", "gptq" or "compressed-tensors"; None for a model that is not quantised
    quantized   names of the modules whose weights are stored in 4 bits
    dense       names of all other tensors
    ignored     tensors that w4a16 needs nothing from (scales of a quantised KV cache)
    """

    def __init__(self, path: Path, config: dict[str, Any], reader: Format | None, entries: dict[str, Entry]) -> None:
        self.path, self.config = path, config
        self.format = None if reader is None else reader.name
        self._reader, self._entries = reader, entries
        self._parts = {} if reader is None else _gather(entries, reader.suffixes)
        companions = {entry.name for parts in self._parts.values() for entry in parts.values()}
        rest = entries.keys() - companions
        self.ignored = tuple(sorted(name for name in rest if reader is not None and reader.ignores(name)))
        self._rest = rest.difference(self.ignored)
        self.dense = tuple(sorted(self._rest, key=_natural))
        self.quantized = tuple(sorted(self._parts, key=_natural))
        self._experts: defaultdict[str, list[Expert]] = defaultdict(list)
        for module in self.quantized:
            if found := EXPERT.match(module):
                self._experts[found[1]].append((int(found[2]), found[3]))
        self.expert_prefixes = tuple(self._experts)
        self._check_complete()
        with Files() as files:
            self._plans = {module: self._plan(module, files) for module in self.quantized}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing stays open between reads, so there is nothing to close."""

    def tensor(self, name: str) -> Tensor:
        """A dense tensor, in memory of its own."""
        return self._dense(name).read()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a dense tensor, without reading it."""
        return self._dense(name).shape

    def plan(self, module: str) -> Plan:
        """N, K, group and scheme of a quantised module, without reading it."""
        if module not in self._plans:
            raise _unknown(self.path, module, self.quantized, "quantised module")
        return self._plans[module]

    def weight(self, module: str, parts: Parts | None = None) -> QuantizedWeight:
        """A quantised module, its values checked; `parts`: its entries, when they are read from elsewhere (Stream)."""
        plan = self.plan(module)
        assert self._reader is not None
        try:
            # which lets no value through that QuantizedWeight.check_values would refuse, and reads each once
            return self._reader.read(parts or self._parts[module], plan)
        except BadInput as error:
            codes = self._parts[module][self._reader.suffixes[0]]
            raise codes.bad("values", got=error, wanted="a sound weight") from error

    def entries(self, name: str) -> dict[str, Entry]:
        """The stored tensors that `weight` reads, by suffix, or a dense tensor under the key ''."""
        if name not in self._parts:
            return {"": self._dense(name)}
        planned = () if self._reader is None else self._reader.planned
        return {suffix: entry for suffix, entry in self._parts[name].items() if suffix not in planned}

    def experts(self, prefix: str, source: Source | None = None) -> tuple[QuantizedWeight, QuantizedWeight]:
        """All experts below `prefix`: gate above up [E, 2I, H], and down [E, H, I]."""
        upper, lower = self._expert_modules(prefix)
        return stack(source or self, upper), stack(source or self, lower)

    def expert_modules(self, prefix: str) -> list[str]:
        """The modules that `experts` reads, in its order."""
        return [module for part in self._expert_modules(prefix) for modules in part for module in modules]

    def _expert_modules(self, prefix: str) -> tuple[list[list[str]], list[list[str]]]:
        if prefix not in self.expert_prefixes:
            raise _unknown(self.path, prefix, self.expert_prefixes, "list of experts")
        return expert_modules(self.path, prefix, self._experts[prefix])

    def _dense(self, name: str) -> Entry:
        if name not in self._rest:
            raise _unknown(self.path, name, self.dense, "tensor")
        return self._entries[name]

    def _check_complete(self) -> None:
        for module, parts in self._parts.items():
            assert self._reader is not None
            first = next(iter(parts.values()))
            for suffix in self._reader.required(module):
                if suffix not in parts:
                    raise bad(
                        f"{first.file}: {module}.{suffix}",
                        got=f"no such tensor beside {first.name}",
                        wanted=f"all of {', '.join(self._reader.required(module))}",
                    )
            if f"{module}.weight" in self._rest:
                raise self._entries[f"{module}.weight"].bad("module", got="a dense and a packed weight", wanted="one")
        for name in self.dense:
            if name.rpartition(".")[2] in CODES:
                raise self._entries[name].bad(
                    "tensor",
                    got=f"packed codes in a checkpoint whose quant_method is {self.format}",
                    wanted="the quantization_config that these files were written with",
                    then="Restore config.json.",
                )

    def _plan(self, module: str, files: Files) -> Plan:
        assert self._reader is not None
        return self._reader.plan(module, self._parts[module], files)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads config.json and every safetensors header; raises BadCheckpoint or Unsupported at what is wrong."""
    folder = Path(path)
    if not os.path.isdir(folder):
        raise bad(
            folder, got="no such folder", wanted="a folder with config.json and *.safetensors", then="Check the path."
        )
    config = read_json(folder / "config.json")
    return Checkpoint(folder, config, _detect(folder, config), read_entries(folder))


def _detect(folder: Path, config: dict[str, Any]) -> Format | None:
    fields = _quantization(folder, config)
    if fields is None:
        return None
    default = CompressedTensors.name if "config_groups" in fields.values else ...
    method = fields.get("quant_method", kind=str, wanted=" or ".join(FORMATS), default=default)
    if method not in FORMATS:
        raise fields.unsupported(
            "quant_method", got=repr(method), wanted=" or ".join(FORMATS), then="Requantise it with `w4a16 quantize`."
        )
    return FORMATS[method](fields)


def _quantization(folder: Path, config: dict[str, Any]) -> Fields | None:
    text = config.get("text_config")
    for holder, where in (
        (config, "config.json"),
        (text if isinstance(text, dict) else {}, "config.json: text_config"),
    ):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key) is not None:
                return Fields(holder, f"{folder / where}").child(key, holder[key])
    for name, method in SIDE_FILES.items():
        if (folder / name).exists():
            return Fields({"quant_method": method, **read_json(folder / name)}, f"{folder / name}")
    return None


def _gather(entries: dict[str, Entry], suffixes: tuple[str, ...]) -> dict[str, Parts]:
    parts: defaultdict[str, dict[str, Entry]] = defaultdict(dict)
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        if module and suffix in suffixes:
            parts[module][suffix] = entry
    return dict(parts)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,9})", name)]


def _unknown(path: Path, name: str, names: Iterable[str], kind: str) -> BadInput:
    listed = list(names)
    shown = ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or "none"
    return BadInput(
        explain_mismatch(f"{path}: {kind}", got=repr(name), wanted=f"one of {shown}", then="Check the name.")
    )
