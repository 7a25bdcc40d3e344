"""Reading onto a GPU, packed there from pinned memory, gives what reading and packing on the CPU gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_weight

import w4a16
from w4a16 import BadCheckpoint, layouts, pack
from w4a16.api import pack_all
from w4a16.checkpoints import FORMATS, Scheme, open_checkpoint, pieces, write_checkpoint
from w4a16.checkpoints.stream import Stream
from w4a16.layouts import sm90, unpack
from w4a16.nn import W4A16Linear


def written(folder: Path, form: str, *, act_order: bool = False) -> Path:
    items = [("embed.weight", torch.randn(1000, 64).bfloat16())]
    for index in range(6):
        weight = random_weight(512, 1024, group=128, asym=True, act_order=act_order)
        items.append((f"model.layers.{index}.proj", weight))  # type: ignore[arg-type]
    scheme = Scheme(128, False, act_order)
    write_checkpoint(folder, format=form, config={}, scheme=scheme, items=items, shard_bytes=1 << 20)
    return folder


@pytest.mark.parametrize(("form", "act_order"), [*((form, False) for form in FORMATS), ("gptq", True)])
@pytest.mark.parametrize("piece", [1000, 32 << 20])
def test_the_same_weights(
    form: str, act_order: bool, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
    checkpoint = open_checkpoint(written(tmp_path / "model", form, act_order=act_order))
    device = torch.device("cuda")
    names = [*checkpoint.dense, *checkpoint.quantized]
    with Stream(checkpoint, [(name, device) for name in names]) as reading:
        for name in checkpoint.dense:
            assert torch.equal(reading.tensor(name).cpu(), checkpoint.tensor(name))
        for name in checkpoint.quantized:
            wanted = checkpoint.weight(name)
            got = reading.weight(name)
            assert got.codes.device.type == "cuda"
            on_gpu, on_cpu = pack(got, device=device), pack(wanted, device=device)
            for one, other in ((on_gpu, on_cpu), (unpack(on_gpu), unpack(on_cpu))):
                assert torch.equal(one.codes, other.codes)
                assert torch.equal(one.scales, other.scales)
                assert torch.equal(one.zeros, other.zeros)  # type: ignore[arg-type]
            assert (got.perm is None) != act_order
            if act_order:
                assert torch.equal(got.perm.cpu(), wanted.perm)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("layout", [layout for layout in layouts.LAYOUTS if layout != layouts.INT4PACK])
def test_packing_on_the_gpu_gives_the_bits_of_the_cpu(layout: str) -> None:
    weight = random_weight(136, 1024, group=128, asym=True)
    there, here = layouts.pack(weight.to("cuda"), layout=layout), layouts.pack(weight, layout=layout)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.scales.cpu(), here.scales)
    assert torch.equal(there.zeros.cpu(), here.zeros)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("act", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "group", "experts"), [(72, 1120, 32, 0), (136, 576, 64, 2), (24, 1152, 1152, 3), (256, 512, 128, 64)]
)
def test_packing_for_hopper_gives_the_bits_of_the_cpu(
    n: int, k: int, group: int, experts: int, act: torch.dtype, asym: bool
) -> None:
    weight = random_weight(n, k, group=group, asym=asym, experts=experts)
    there, here = (layouts.pack(w, layout=layouts.SM90, act=act) for w in (weight.to("cuda"), weight))
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.scales.cpu(), here.scales)
    assert not asym or torch.equal(there.zeros.cpu(), here.zeros)  # type: ignore[union-attr, arg-type]


def test_packing_all_at_once_gives_the_bits_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm90, "BLOCK_TILES", 100)
    sizes = [(64, 256), (192, 256), (72, 256), (128, 512), (4096, 256), (64, 512)]
    weights = [random_weight(n, k, group=128, asym=asym) for asym in (False, True) for n, k in sizes]
    together = pack_all([weight.to("cuda") for weight in weights], device="cuda")
    for weight, there in zip(weights, together, strict=True):
        here = layouts.pack(weight, layout=there.layout)
        assert torch.equal(there.codes.cpu(), here.codes)
        assert torch.equal(there.scales.cpu(), here.scales)
        assert here.zeros is there.zeros or torch.equal(there.zeros.cpu(), here.zeros)  # type: ignore[union-attr, arg-type]


def test_scales_that_would_poison_are_found_when_the_stream_is_left(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "model", "compressed-tensors"))
    names = checkpoint.quantized
    entry = checkpoint.entries(names[2])["weight_scale"]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + 2)
        file.write(bytes(2))

    def read() -> None:
        with Stream(checkpoint, [(name, torch.device("cuda")) for name in names]) as reading:
            for name in names:
                pack(reading.weight(name), device="cuda")

    with pytest.raises(BadCheckpoint, match=f"{entry.name} values: got a zero"):
        read()


def test_little_more_than_the_packed_weights_is_ever_held(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "model", "awq"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, kept = torch.cuda.memory_allocated(), []
    with Stream(checkpoint, [(name, torch.device("cuda")) for name in checkpoint.quantized]) as reading:
        for name in checkpoint.quantized:
            kept.append(pack(reading.weight(name), device="cuda"))
    packed = sum(weight.nbytes for weight in kept)
    assert torch.cuda.max_memory_allocated() - before <= packed + (64 << 20)


def test_a_model_of_transformers_is_the_one_the_cpu_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from models import RECIPES, make_checkpoint
    from w4a16.plugins import _places

    monkeypatch.setattr(_places, "LARGE_BYTES", 0)  # every dense tensor comes by the stream
    for kind in ("qwen3", "qwen3_moe"):
        made = make_checkpoint(kind, RECIPES["gptq-asym"], tmp_path / kind)
        here, there = (w4a16.load(str(made.folder), device, dtype=torch.bfloat16) for device in ("cpu", "cuda"))
        dense = {name: tensor for name, tensor in here.state_dict().items() if tensor.is_floating_point()}
        for name, tensor in there.state_dict().items():
            assert tensor.device.type == "cuda"
            assert name not in dense or name.endswith(".scales") or torch.equal(tensor.cpu(), dense[name]), name
        packed = [(name, layer) for name, layer in there.named_modules() if isinstance(layer, W4A16Linear)]
        assert packed
        for name, layer in packed:
            got, wanted = unpack(layer.get()), unpack(here.get_submodule(name).get())
            assert torch.equal(got.codes.cpu(), wanted.codes)
            assert torch.equal(got.scales.cpu(), wanted.scales)
