"""The tensors of a checkpoint folder: every safetensors header, checked before a single value is read.

The values are read into memory of their own; the files are never mapped: a mapped file counts as resident for as long
as it is open, and a process dies of SIGBUS, without an exception, when such a file shrinks.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import BadCheckpoint, Unsupported, explain_mismatch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
INTEGERS = {"I32": "<i", "I64": "<q"}  # as Python's struct calls them
FLOATS = ("BF16", "F16", "F32")
LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header, 64 bits, little-endian
LARGE = 1 << 17  # bytes; where malloc starts to ask the system for each block too
MAX_HEADER = 100_000_000  # the bound of the safetensors library
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
AGAIN = "Download or write the checkpoint again."


def bad(where: object, *, got: object, wanted: object, then: str = AGAIN) -> BadCheckpoint:
    return BadCheckpoint(explain_mismatch(str(where), got=got, wanted=wanted, then=then))


@dataclass(eq=False)  # frozen takes three times as long to make, and a model has thousands
class Entry:
    """One tensor as its file's header describes it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def bad(self, what: str, *, got: object, wanted: object, then: str = AGAIN) -> BadCheckpoint:
        return bad(f"{self.file}: {self.name} {what}", got=got, wanted=wanted, then=then)

    def want(self, dtypes: str | tuple[str, ...], shape: tuple[int | None, ...]) -> None:
        """Raises unless the dtype is one of `dtypes` and the shape is `shape`, where None is any length but zero."""
        allowed = (dtypes,) if isinstance(dtypes, str) else dtypes
        if self.dtype not in allowed:
            raise self.bad("dtype", got=self.dtype, wanted=" or ".join(allowed))
        fits = self.shape == shape or (
            len(shape) == len(self.shape)
            and all(have > 0 if want is None else have == want for have, want in zip(self.shape, shape, strict=True))
        )
        if not fits:
            wanted = "[" + ", ".join("any" if want is None else str(want) for want in shape) + "]"
            raise self.bad("shape", got=list(self.shape), wanted=wanted)

    def read(self) -> Tensor:
        if not self.nbytes:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="cpu")
        buffer = memory(self.nbytes)
        with Files() as files:
            Run([self]).read_into(buffer, 0, files)
        return torch.frombuffer(buffer, dtype=DTYPES[self.dtype]).view(self.shape)

    def integers(self, files: Files) -> list[int]:
        """The values of a small I32 or I64 tensor."""
        buffer = bytearray(self.nbytes)
        Run([self]).read_into(buffer, 0, files)
        return [value for (value,) in struct.iter_unpack(INTEGERS[self.dtype], buffer)]

    def doubted(self, sign: Tensor) -> bool:
        """Whether `sign`, a number made of the values, is NaN."""
        return math.isnan(sign.item())


@dataclass(eq=False)
class Run:
    """Tensors of one file, each where the one before it ends: read as if they were one."""

    entries: list[Entry]

    def read_into(self, buffer: bytearray | mmap.mmap | memoryview, start: int, files: Files) -> None:
        """Fills `buffer` from byte `start` of the first tensor on."""
        position, wanted = self.entries[0].start + start, memoryview(buffer)
        try:
            got = files.fill(wanted, self.entries[0].file, position)
        except OSError as error:
            raise self._at(position).bad(
                "data", got=error.strerror, wanted="a readable file", then="Check the disk."
            ) from None
        if got != len(wanted):
            entry = self._at(position + got)
            there = f"{position + got - entry.start} bytes before the file ended"
            raise entry.bad("data", got=there, wanted=f"{entry.nbytes} bytes")

    def _at(self, position: int) -> Entry:
        """The tensor that byte `position` of the file belongs to."""
        return next(entry for entry in reversed(self.entries) if entry.start <= position)


class Files:
    """Files opened for reading, each once; those of one thread."""

    def __init__(self) -> None:
        self._opened: dict[Path, io.FileIO] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._opened.values():
            file.close()

    def fill(self, buffer: memoryview, path: Path, position: int) -> int:
        """Bytes read from there until the buffer is full or the file ends; one read gives at most 2 GiB."""
        if path not in self._opened:
            self._opened[path] = path.open("rb", buffering=0)
        done = 0
        while done < len(buffer) and (got := _read_at(self._opened[path], buffer[done:], position + done)):
            done += got
        return done


def _read_at(file: io.FileIO, buffer: memoryview, position: int) -> int:
    if sys.platform == "win32":
        file.seek(position)
        return file.readinto(buffer) or 0
    return os.preadv(file.fileno(), [buffer], position)  # one wait for Python's lock, where seek and readinto are two


def memory(nbytes: int) -> bytearray | mmap.mmap:
    """Zeroed memory for a tensor, which goes back to the system the moment the tensor is freed.

    malloc keeps it, and torch's aligned requests did not fit the holes (glibc 2.36): loading and packing a 1 GB model
    layer by layer peaked at 1.95 to 2.9 times its size (benchmarks/reading.py).
    """
    if nbytes < LARGE or sys.platform == "win32":
        return bytearray(nbytes)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise bad(path, got=error.strerror, wanted="a readable JSON file") from None


def parse_json(text: bytes, where: object) -> dict[str, Any]:
    """One JSON object; a key given twice is an error, as its two values cannot both be meant."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        "".join(values).encode()  # half a surrogate pair is a ValueError here, not wherever the name goes later
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise bad(where, got=f"the key {twice!r} twice", wanted="each key once")
        return values

    try:
        values = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise bad(where, got=f"text that is not JSON ({error})", wanted="JSON") from None
    if not isinstance(values, dict):
        raise bad(where, got=f"JSON of type {type(values).__name__}", wanted="a JSON object")
    return values


def read_header(path: Path) -> list[Entry]:
    """The tensors of one safetensors file; raises unless they fill the file exactly, each byte once."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == LENGTH_BYTES else size
            start = LENGTH_BYTES + length
            if start > size or length > MAX_HEADER:
                wanted = f"a header of {length} bytes" if len(prefix) == LENGTH_BYTES else "a safetensors header"
                raise bad(path, got=f"{size} bytes, truncated or not safetensors", wanted=wanted)
            text = file.read(length)
    except OSError as error:
        raise bad(path, got=error.strerror, wanted="a readable safetensors file") from None
    header = parse_json(text, f"{path}: header")
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise bad(f"{path}: __metadata__", got="no JSON object", wanted="a JSON object")
    entries = [_entry(path, name, fields, start) for name, fields in header.items()]
    position = start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise entry.bad("offset", got=f"{entry.start - start}, which {kind}", wanted=position - start)
        position += entry.nbytes
        if position > size:
            raise entry.bad("data", got=f"a file of {size} bytes, truncated", wanted=f"at least {position} bytes")
    if position != size:
        raise bad(path, got=f"{size} bytes", wanted=f"{position}, the end of its last tensor")
    return entries


def _entry(path: Path, name: str, fields: object, data: int) -> Entry:
    where = f"{path}: {name}"
    if not isinstance(fields, dict):
        raise bad(where, got=repr(fields), wanted="dtype, shape and data_offsets")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"{where} dtype", got=repr(dtype), wanted=f"one of {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise bad(f"{where} shape", got=repr(shape), wanted="a list of lengths")
    if not _naturals(offsets) or len(offsets) != 2:
        raise bad(f"{where} data_offsets", got=repr(offsets), wanted="two offsets in bytes")
    entry = Entry(name, path, dtype, tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise entry.bad("data_offsets", got=f"{offsets[1] - offsets[0]} bytes", wanted=f"{entry.nbytes} bytes")
    return entry


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder's shards by name; raises when shards and index disagree."""
    index = _index(folder)
    if index is None:
        single = folder / "model.safetensors"
        files: Iterable[Path] = [single] if os.path.exists(single) else sorted(folder.glob("*.safetensors"))
    else:
        files = [folder / name for name in sorted(set(index.values()))]
    if not files:
        raise _no_weights(folder)
    entries: dict[str, Entry] = {}
    held: dict[str, str] = {}
    for file in files:
        if not os.path.isfile(file):  # unlike Path.is_file, False for a name that no file could have
            raise bad(file, got="no such file", wanted="a shard that the index names")
        for entry in read_header(file):
            other = entries.setdefault(entry.name, entry)
            if other is not entry:
                raise entry.bad("file", got=f"the tensor in {other.file.name} too", wanted="it in one file")
        held.update(dict.fromkeys(entries.keys() - held.keys(), file.name))
    for name, file_name in (index or {}).items():
        if held.get(name) != file_name:
            got = f"the tensor in {held.get(name, 'no file')}"
            raise bad(f"{folder / file_name}: {name}", got=got, wanted="it there, as the index says")
    return entries


def _index(folder: Path) -> dict[str, str] | None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        found = sorted(folder.glob("*.safetensors.index.json"))
        if len(found) != 1:
            return None
        path = found[0]
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise bad(f"{path}: weight_map", got=repr(index), wanted="tensor names and their files")
    files = {file for file in index.values() if isinstance(file, str)}
    beside = {file for file in files if Path(file).name == file and file.endswith(".safetensors")}
    for name, file in index.items():
        if not isinstance(file, str) or file not in beside:
            raise bad(f"{path}: {name}", got=repr(file), wanted="the name of a safetensors file beside the index")
    return index


def _no_weights(folder: Path) -> Exception:
    pickled = [path.name for pattern in PICKLED for path in folder.glob(pattern)]
    if pickled:
        return Unsupported(
            f"{folder}: got {pickled[0]}, wanted safetensors. A pickle runs whatever code it holds when read; "
            "save the model again with safetensors."
        )
    return bad(folder, got="no *.safetensors file", wanted="at least one")
