"""Reading ahead by threads gives what reading one by one gives, in order, within its bytes, and stops when left."""

from __future__ import annotations

import gc
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import w4a16
from models import RECIPES, make_checkpoint
from w4a16 import BadCheckpoint, BadInput, QuantizedWeight
from w4a16.checkpoints import Checkpoint, open_checkpoint, pieces, stream
from w4a16.checkpoints.shards import Entry
from w4a16.checkpoints.stream import Stream
from w4a16.plugins import _places
from w4a16.plugins import transformers as plugin

CPU = torch.device("cpu")


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    pairs = [(a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros), (a.perm, b.perm)]
    return a.group == b.group and all(x is y or torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


def threads() -> int:
    return sum(thread.name.startswith("w4a16-read") for thread in threading.enumerate())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("readers", "ahead", "batch"), [(0, 1, 1), (3, 1, 1), (3, 1 << 20, 1), (3, 1 << 20, 5000)])
def test_what_one_by_one_gives(
    recipe: str, readers: int, ahead: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "AHEAD_BYTES", ahead)
    monkeypatch.setattr(stream, "BATCH_BYTES", batch)
    made = make_checkpoint("qwen3_moe", RECIPES[recipe], tmp_path / "model")
    checkpoint = open_checkpoint(made.folder)
    (block, *_) = checkpoint.expert_prefixes
    linears = [name for name in checkpoint.quantized if ".experts." not in name]
    names = [*linears, *checkpoint.dense, *checkpoint.expert_modules(block)]
    with Stream(checkpoint, [(name, CPU) for name in names], readers=readers) as reading:
        for name in linears:
            assert same(reading.weight(name), checkpoint.weight(name))
        for name in checkpoint.dense:
            assert torch.equal(reading.tensor(name), checkpoint.tensor(name))
        for got, wanted in zip(checkpoint.experts(block, reading), checkpoint.experts(block), strict=True):
            assert same(got, wanted)
    assert threads() == 0


def opened(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(make_checkpoint("qwen3", RECIPES["gptq"], tmp_path / "model").folder)


@pytest.mark.parametrize("readers", [0, 2])
def test_another_order_is_refused(readers: int, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    first, second = checkpoint.quantized[:2]
    with Stream(checkpoint, [(first, CPU), (second, CPU)], readers=readers) as reading:
        with pytest.raises(BadInput, match=f"got {second}, wanted {first}"):
            reading.weight(second)
        with pytest.raises(BadInput, match="wanted"):
            reading.weight("no such module")
    with Stream(checkpoint, [], readers=readers) as reading, pytest.raises(BadInput, match="wanted the end"):
        reading.weight(first)


@pytest.mark.parametrize("batch", [1, 3000])
def test_no_more_bytes_wait_than_may_and_large_tensors_come_in_pieces(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(tmp_path)
    monkeypatch.setattr(stream, "AHEAD_BYTES", 1000)
    monkeypatch.setattr(stream, "BATCH_BYTES", batch)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 256)
    names = [*checkpoint.dense, *checkpoint.quantized]
    with Stream(checkpoint, [(name, CPU) for name in names], readers=2) as reading:
        for name in names:
            if name in checkpoint.dense:
                assert torch.equal(reading.tensor(name), checkpoint.tensor(name))
            else:
                assert same(reading.weight(name), checkpoint.weight(name))
            waiting = [batch.nbytes for batch in reading._coming if batch.items[0][0] not in checkpoint.dense]
            assert sum(waiting) == reading._ahead
            assert sum(waiting[:-1]) < 1000


def test_a_reader_that_fails_raises_where_the_weight_is_asked_for(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    names = checkpoint.quantized
    (tmp_path / "model" / "model.safetensors").write_bytes(b"short")
    with (
        Stream(checkpoint, [(name, CPU) for name in names], readers=2) as reading,
        pytest.raises(BadCheckpoint, match="bytes before the file ended"),
    ):
        reading.weight(names[0])
    assert threads() == 0


def test_of_a_batch_the_tensor_where_the_file_ends_is_named(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    names = checkpoint.quantized
    last = max((e for name in names for e in checkpoint.entries(name).values()), key=lambda entry: entry.start)
    with last.file.open("r+b") as file:
        file.truncate(last.start + 3)

    def read() -> None:
        with Stream(checkpoint, [(name, CPU) for name in names], readers=2) as reading:
            for name in names:
                reading.weight(name)

    with pytest.raises(BadCheckpoint, match=f"{last.name} data: got 3 bytes before the file ended"):
        read()


def test_what_lies_side_by_side_in_a_file_is_read_at_once(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    places = {"b": (one, 1024), "a": (one, 512), "far": (one, 4096), "odd": (one, 1536), "skewed": (one, 1546)}
    sizes = {"a": 512, "b": 512, "odd": 10, "skewed": 512, "far": 512, "x": 512}
    places["x"] = (other, 1024)
    entries = [Entry(name, file, "U8", (sizes[name],), start) for name, (file, start) in places.items()]
    runs = [[entry.name for entry in run.entries] for run in pieces._runs(entries)]
    assert sorted(runs) == [["a", "b", "odd"], ["far"], ["skewed"], ["x"]]  # skewed would lie at an odd address


def test_memory_that_cannot_be_pinned_raises_where_the_weight_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(_: object) -> None:
        raise torch.OutOfMemoryError("no pinned memory")

    checkpoint = opened(tmp_path)
    monkeypatch.setattr(pieces.Slot, "wait", wait)
    names = checkpoint.quantized
    with (
        Stream(checkpoint, [(name, CPU) for name in names], readers=2) as reading,
        pytest.raises(torch.OutOfMemoryError, match="no pinned memory"),
    ):
        reading.weight(names[0])
    assert threads() == 0


def test_garbage_waits_until_the_stream_is_left(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    with suppress(KeyError), Stream(checkpoint, [(name, CPU) for name in checkpoint.quantized], readers=1):
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def zero_scale(checkpoint: Checkpoint, module: str) -> str:
    """Makes a scale in the file of a module a zero; its name."""
    entry = checkpoint.entries(module)["scales"]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + 2)
        file.write(bytes(2))
    return entry.name


@pytest.mark.parametrize("readers", [0, 2])
def test_scales_that_would_poison_are_found_when_the_stream_is_left(readers: int, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    names = checkpoint.quantized
    broken = zero_scale(checkpoint, names[3])

    def read() -> None:
        with Stream(checkpoint, [(name, CPU) for name in names], readers=readers) as reading:
            for name in names:
                reading.weight(name)

    with pytest.raises(BadCheckpoint, match=f"{broken} values: got a zero"):
        read()
    assert threads() == 0


def test_what_fails_while_reading_is_raised_before_what_is_found_at_the_end(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    names = checkpoint.quantized
    zero_scale(checkpoint, names[0])

    def read() -> None:
        with Stream(checkpoint, [(name, CPU) for name in names], readers=2) as reading:
            reading.weight(names[0])
            raise KeyError

    with pytest.raises(KeyError):
        read()


def test_leaving_early_stops_the_threads(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)

    def leave() -> None:
        with Stream(checkpoint, [(name, CPU) for name in checkpoint.quantized], readers=2) as reading:
            reading.weight(checkpoint.quantized[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert threads() == 0


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a load onto one GPU does: threads read large parameters and packed weights beside transformers' part."""
    stock = Stream.__init__

    def threaded(self: Stream, *arguments: Any, readers: int = 2) -> None:
        stock(self, *arguments, readers=readers)

    monkeypatch.setattr(Stream, "__init__", threaded)
    monkeypatch.setattr(_places, "LARGE_BYTES", 0)
    monkeypatch.setattr(plugin, "_only_gpu", lambda *_: CPU)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "qwen3_moe"])
def test_a_model_read_so_is_the_same(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = make_checkpoint(kind, RECIPES["gptq"], tmp_path / "model")
    ids = torch.randint(3, 90, (1, 6))
    wanted = w4a16.load(str(made.folder))
    request.getfixturevalue("early")
    got = w4a16.load(str(made.folder))
    assert threads() == 0
    got.save_pretrained(tmp_path / "again")
    again = w4a16.load(str(tmp_path / "again"))
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(got(ids).logits, wanted(ids).logits)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("where", ["swap", "fill"])
def test_a_model_that_fails_leaves_no_thread(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_checkpoint("qwen3", RECIPES["gptq"], tmp_path / "model")

    def fail(*_: object) -> None:
        raise KeyError(where)

    monkeypatch.setattr(plugin, where, fail)
    with pytest.raises(KeyError, match=where):
        w4a16.load(str(made.folder))
    assert threads() == 0
    assert gc.isenabled()
