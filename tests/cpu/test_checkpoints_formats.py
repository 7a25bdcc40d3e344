"""Each format against its definition, bit by bit: what is read, what is written, and what is converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats
import pytest
import torch
from formats import Plain
from safetensors.torch import load_file
from torch import Tensor

from w4a16.checkpoints import FORMATS, Scheme, convert, open_checkpoint, write_checkpoint
from w4a16.checkpoints.bits import transpose_nibbles
from w4a16.errors import Unsupported
from w4a16.weight import QuantizedWeight, unpack_nibbles

MODULE = "model.layers.0.self_attn.q_proj"
GROUPS = (32, 64, 128, -1)


def same(got: QuantizedWeight, wanted: QuantizedWeight) -> bool:
    """Equal bit for bit."""
    pairs = [(getattr(got, name), getattr(wanted, name)) for name in ("codes", "scales", "zeros", "perm")]
    return got.group == wanted.group and all(
        (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and torch.equal(a, b))) for a, b in pairs
    )


def read(folder: Path, module: str = MODULE) -> QuantizedWeight:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.weight(module)


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    return formats.write_folder(folder, formats.named({MODULE: tensors}), quantization)


def check(weight: QuantizedWeight, plain: Plain) -> None:
    """The codes, zero points and scales are those of `plain`, and so, exactly, is the dense weight."""
    assert weight.scales.dtype == plain.scales.dtype
    assert torch.equal(weight.scales, plain.scales)
    columns = range(weight.k) if weight.perm is None else weight.perm.tolist()
    codes = torch.tensor(plain.codes, dtype=torch.uint8)[:, list(columns)]
    assert torch.equal(unpack_nibbles(weight.codes), codes)
    zeros = torch.tensor(plain.zeros, dtype=torch.uint8)
    assert torch.equal(zeros, torch.full_like(zeros, 8) if weight.zeros is None else weight.zeros)
    assert (weight.dequantize() - plain.dense()).abs().max() == 0


def plain_weight(group: int, *, n: int = 24, k: int = 256, **kind: Any) -> tuple[Plain, int]:
    return formats.make(n, k, k if group == -1 else group, **kind), group


@pytest.mark.parametrize("act", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS)
def test_reads_awq(tmp_path: Path, group: int, act: torch.dtype) -> None:
    plain, _ = plain_weight(group, symmetric=False, act=act)
    weight = read(write(tmp_path, formats.awq(plain), formats.awq_config(group)))
    check(weight, plain)
    assert weight.has_zeros


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_reads_gptq(tmp_path: Path, version: int, group: int, symmetric: bool, act_order: bool) -> None:
    plain, _ = plain_weight(group, symmetric=symmetric, act_order=act_order)
    name = {1: "gptq", 2: "gptq_v2"}[version]
    config = formats.gptq_config(group, sym=symmetric, desc_act=act_order, checkpoint_format=name)
    weight = read(write(tmp_path, formats.gptq(plain, version=version), config))
    check(weight, plain)
    assert weight.has_zeros != symmetric
    assert (weight.perm is not None) == (act_order and group != -1)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_reads_compressed_tensors(tmp_path: Path, group: int, symmetric: bool, act_order: bool) -> None:
    # N=20: the zero points of the last word are padding
    plain, _ = plain_weight(group, n=20, symmetric=symmetric, act_order=act_order, act=torch.bfloat16)
    ordered = {"actorder": "group"} if act_order else {}
    tensors = formats.compressed_tensors(plain, symmetric=symmetric, act_order=act_order)
    config = formats.ct_config(formats.ct_group(group, symmetric=symmetric, **ordered))
    weight = read(write(tmp_path, tensors, config))
    check(weight, plain)
    assert weight.has_zeros != symmetric


def test_reads_gptq_without_g_idx_and_with_an_identity_one(tmp_path: Path) -> None:
    plain, _ = plain_weight(32, symmetric=True)
    tensors = formats.gptq(plain, version=1)
    with_order = read(write(tmp_path / "a", tensors, formats.gptq_config(32, sym=True, desc_act=True)))
    tensors.pop("g_idx")
    without = read(write(tmp_path / "b", tensors, formats.gptq_config(32, sym=True)))
    assert with_order.perm is None
    assert same(with_order, without)


def test_zero_points_are_believed_over_the_configuration(tmp_path: Path) -> None:
    plain, _ = plain_weight(32, symmetric=False)
    weight = read(write(tmp_path / "gptq", formats.gptq(plain, version=1), formats.gptq_config(32, sym=True)))
    check(weight, plain)
    weight = read(write(tmp_path / "awq", formats.awq(plain), formats.awq_config(32, zero_point=False)))
    check(weight, plain)


def test_awq_without_zero_points(tmp_path: Path) -> None:
    plain, _ = plain_weight(32, symmetric=True)
    tensors = formats.awq(plain)
    tensors.pop("qzeros")
    weight = read(write(tmp_path, tensors, formats.awq_config(32, zero_point=False)))
    check(weight, plain)
    assert not weight.has_zeros


def test_awq_keys_of_its_first_version(tmp_path: Path) -> None:
    plain, _ = plain_weight(64, symmetric=False)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    check(read(write(tmp_path, formats.awq(plain), config)), plain)


def test_compressed_tensors_with_int8_zero_points(tmp_path: Path) -> None:
    plain, _ = plain_weight(64, symmetric=False)
    tensors = formats.compressed_tensors(plain, symmetric=False)
    tensors["weight_zero_point"] = (torch.tensor(plain.zeros) - 8).to(torch.int8)
    check(read(write(tmp_path, tensors, formats.ct_config(formats.ct_group(64, symmetric=False)))), plain)


def test_g_idx_of_minus_one_means_no_order(tmp_path: Path) -> None:
    plain, _ = plain_weight(64, symmetric=True)
    tensors = formats.compressed_tensors(plain, symmetric=True)
    tensors["weight_g_idx"] = torch.full((256,), -1, dtype=torch.int32)
    weight = read(write(tmp_path, tensors, formats.ct_config(formats.ct_group(64, symmetric=True))))
    assert weight.perm is None
    check(weight, plain)


def reference_weight(
    group: int, *, symmetric: bool, act_order: bool = False, n: int = 24
) -> tuple[QuantizedWeight, Plain]:
    """The same weight twice: as w4a16 holds it, packed here, and plain."""
    plain, _ = plain_weight(group, n=n, symmetric=symmetric, act_order=act_order)
    perm = torch.tensor(plain.g_idx).argsort(stable=True) if act_order and group != -1 else None
    columns = list(range(256)) if perm is None else perm.tolist()
    rows = [[plain.codes[row][column] for column in columns] for row in range(n)]
    words = [[sum(row[8 * w + i] << (4 * i) for i in range(8)) for w in range(32)] for row in rows]
    return QuantizedWeight(
        codes=torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w for w in row] for row in words], dtype=torch.int32),
        scales=plain.scales,
        zeros=None if symmetric else torch.tensor(plain.zeros, dtype=torch.uint8),
        group=256 if group == -1 else group,
        perm=perm,
    ), plain


def write_one(folder: Path, weight: QuantizedWeight, to: str, scheme: Scheme) -> dict[str, Tensor]:
    write_checkpoint(folder, format=to, config={"model_type": "qwen3"}, scheme=scheme, items=[(MODULE, weight)])
    return {name.rpartition(".")[2]: tensor for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_writes_what_the_definition_says(tmp_path: Path, to: str, group: int, symmetric: bool, act_order: bool) -> None:
    weight, plain = reference_weight(group, symmetric=symmetric, act_order=act_order)
    check(weight, plain)
    scheme = Scheme(group, symmetric, act_order)
    if weight.perm is not None and to != "gptq":
        with pytest.raises(Unsupported, match="got an act-order weight, wanted its columns in order"):
            write_one(tmp_path / "out", weight, to, scheme)
        assert list(tmp_path.iterdir()) == []
        return
    tensors = write_one(tmp_path / "out", weight, to, scheme)
    readers: dict[str, Callable[[dict[str, Tensor]], Plain]] = {
        "awq": formats.read_awq,
        "gptq": lambda tensors: formats.read_gptq(tensors, version=1 if symmetric else 2),
        "compressed-tensors": formats.read_compressed_tensors,
    }
    check(weight, readers[to](tensors))
    assert same(read(tmp_path / "out"), weight)


def test_symmetric_zero_points_as_the_formats_store_them(tmp_path: Path) -> None:
    weight, _ = reference_weight(64, symmetric=True)
    awq = write_one(tmp_path / "awq", weight, "awq", Scheme(64, True))
    assert (awq["qzeros"] == torch.tensor(0x88888888 - (1 << 32), dtype=torch.int32)).all()
    gptq = write_one(tmp_path / "gptq", weight, "gptq", Scheme(64, True))
    assert (gptq["qzeros"] == 0x77777777).all()
    assert "weight_zero_point" not in write_one(tmp_path / "ct", weight, "compressed-tensors", Scheme(64, True))


@pytest.mark.parametrize("to", ["awq", "gptq"])
def test_rows_that_do_not_fill_words(tmp_path: Path, to: str) -> None:
    weight, _ = reference_weight(64, symmetric=True, n=20)
    with pytest.raises(Unsupported, match="got N=20, wanted a multiple of 8"):
        write_one(tmp_path / "out", weight, to, Scheme(64, True))
    check(
        weight,
        formats.read_compressed_tensors(write_one(tmp_path / "ct", weight, "compressed-tensors", Scheme(64, True))),
    )


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_there_and_back(tmp_path: Path, source: str, to: str, group: int, symmetric: bool) -> None:
    weight, _ = reference_weight(group, symmetric=symmetric)
    dense = torch.randn(64, 8).bfloat16()
    items: list[tuple[str, Tensor | QuantizedWeight]] = [("lm_head.weight", dense), (MODULE, weight)]
    scheme = Scheme(group, symmetric)
    write_checkpoint(tmp_path / "a", format=source, config={}, scheme=scheme, items=items, ignore=["lm_head"])
    convert(tmp_path / "a", tmp_path / "b", to)
    convert(tmp_path / "b", tmp_path / "c", source)
    for folder in (tmp_path / "b", tmp_path / "c"):
        with open_checkpoint(folder) as checkpoint:
            assert same(checkpoint.weight(MODULE), weight)
            assert torch.equal(checkpoint.tensor("lm_head.weight"), dense)
            assert checkpoint.plan(MODULE).scheme == scheme
    first, last = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "c/model.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_act_order_goes_to_gptq_only(tmp_path: Path) -> None:
    weight, _ = reference_weight(32, symmetric=False, act_order=True)
    write_one(tmp_path / "a", weight, "gptq", Scheme(32, False, True))
    convert(tmp_path / "a", tmp_path / "b", "gptq")
    assert same(read(tmp_path / "b"), weight)
    for to in ("awq", "compressed-tensors"):
        with pytest.raises(Unsupported, match="Write GPTQ instead"):
            convert(tmp_path / "a", tmp_path / to, to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize(("rows", "columns"), [(8, 1), (64, 3), (256, 40), (8, 0)])
def test_transpose_nibbles(rows: int, columns: int) -> None:
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (rows, columns), dtype=torch.int32)
    out = transpose_nibbles(words)
    assert torch.equal(unpack_nibbles(out), unpack_nibbles(words).view(rows, -1).t())
    assert columns == 0 or torch.equal(transpose_nibbles(out), words)


def test_blocks_of_a_large_layer_agree() -> None:
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (2048, 200), dtype=torch.int32)  # more than one block
    assert torch.equal(unpack_nibbles(transpose_nibbles(words)), unpack_nibbles(words).t())
