"""Checkpoint folders: what is found in them, experts, overrides, conversion, and what writing leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import formats
import pytest
import torch
from helpers import random_weight
from safetensors import safe_open
from torch import Tensor

from w4a16.checkpoints import FORMATS, Scheme, convert, open_checkpoint, write_checkpoint
from w4a16.errors import BadCheckpoint, BadInput, Unsupported
from w4a16.weight import QuantizedWeight, concat_rows, stack_experts, unpack_nibbles

EXPERTS = "model.layers.0.mlp.experts"


def gptq_parts(n: int, k: int, group: int, **kind: Any) -> dict[str, Tensor]:
    return formats.gptq(formats.make(n, k, group, symmetric=True, **kind), version=1)


def test_modules_and_tensors_in_shards(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 2, 10) for part in ("gate", "up", "down")]
    modules = {name: gptq_parts(16, 64, 32) for name in names}
    dense = {
        "lm_head.weight": torch.randn(8, 64).bfloat16(),
        "model.layers.0.mlp.gate_proj.bias": torch.randn(16).half(),
        "model.norm.weight": torch.randn(64, dtype=torch.float32),
        "model.step": torch.tensor(3),
        "model.empty": torch.empty(0, 4, dtype=torch.bool),
        "model.scale": torch.randn(8).to(torch.float8_e4m3fn),
    }
    folder = formats.write_folder(tmp_path, formats.named(modules, dense), formats.gptq_config(32), shards=3)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.path == tmp_path
        assert checkpoint.config["model_type"] == "qwen3"
        assert checkpoint.format == "gptq"
        assert sorted(checkpoint.quantized) == sorted(names)
        assert checkpoint.quantized[-1].startswith("model.layers.10.")
        assert set(checkpoint.dense) == set(dense)
        assert checkpoint.expert_prefixes == ()
        for name, tensor in dense.items():
            got = checkpoint.tensor(name)
            assert (got.dtype, checkpoint.shape(name)) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8)) if got.ndim else got == tensor
        for name in names:
            weight = checkpoint.weight(name)
            assert (weight.n, weight.k, weight.group) == (16, 64, 32)


def test_read_tensors_are_those_of_safetensors_and_own_their_memory(tmp_path: Path) -> None:
    formats.write_folder(tmp_path, {"a": torch.randn(7, 5), "b": torch.randn(3).half()}, None)
    with open_checkpoint(tmp_path) as checkpoint, safe_open(tmp_path / "model.safetensors", "pt") as library:
        read = {name: checkpoint.tensor(name) for name in checkpoint.dense}
        assert all(torch.equal(tensor, library.get_tensor(name)) for name, tensor in read.items())
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert all(torch.isfinite(tensor).all() for tensor in read.values())


def test_a_dense_model(tmp_path: Path) -> None:
    formats.write_folder(tmp_path, {"model.norm.weight": torch.ones(4)}, None)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.format is None
        assert checkpoint.quantized == ()
        assert checkpoint.dense == ("model.norm.weight",)
        with pytest.raises(BadInput, match=r"got 'model.nrm', wanted one of model.norm.weight"):
            checkpoint.tensor("model.nrm")
        with pytest.raises(BadInput, match="quantised module: got 'x', wanted one of none"):
            checkpoint.weight("x")
        with pytest.raises(BadInput, match="list of experts: got 'x', wanted one of none"):
            checkpoint.experts("x")
    with pytest.raises(Unsupported, match="not quantised"):
        convert(tmp_path, tmp_path / "out", "awq")


def test_reading_under_a_meta_device_context(tmp_path: Path) -> None:
    formats.write_folder(
        tmp_path, formats.named({"a": gptq_parts(16, 64, 32, act_order=True)}), formats.gptq_config(32)
    )
    with open_checkpoint(tmp_path) as checkpoint:
        outside = checkpoint.weight("a")
        with torch.device("meta"):
            inside = checkpoint.weight("a")
    assert torch.equal(inside.codes, outside.codes)


def test_the_configuration_of_a_nested_model_and_of_older_tools(tmp_path: Path) -> None:
    plain = formats.make(16, 64, 32, symmetric=False)
    gptq = formats.named({"a": formats.gptq(plain, version=1)})
    formats.write_folder(tmp_path / "text", gptq, None, text_config={"quantization_config": formats.gptq_config(32)})
    formats.write_folder(tmp_path / "side", gptq, None)
    (tmp_path / "side/quantize_config.json").write_text(
        '{"bits": 4, "group_size": 32, "sym": false, "desc_act": false}'
    )
    awq = formats.named({"a": formats.awq(plain)})
    formats.write_folder(tmp_path / "awq", awq, None)
    (tmp_path / "awq/quant_config.json").write_text('{"w_bit": 4, "q_group_size": 32, "zero_point": true}')
    ct = formats.named({"a": formats.compressed_tensors(plain, symmetric=False)})
    config = formats.ct_config(formats.ct_group(32, symmetric=False))
    del config["quant_method"]
    formats.write_folder(tmp_path / "ct", ct, None, compression_config=config)
    for name in ("text", "side", "awq", "ct"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert torch.equal(checkpoint.weight("a").dequantize(), plain.dense()), name


def test_dynamic_overrides_of_gptq(tmp_path: Path) -> None:
    modules = {"a.q": gptq_parts(16, 64, 32), "a.k": gptq_parts(16, 64, 64), "lm_head": gptq_parts(16, 64, 32)}
    dense = {"a.v.weight": torch.randn(16, 64)}
    rules = {r"-:.*\.v": {}, r"+:.*\.k": {"group_size": 64}, r".*\.q": {"desc_act": True}}
    config = formats.gptq_config(32, sym=True, dynamic=rules, lm_head=True)
    with open_checkpoint(formats.write_folder(tmp_path, formats.named(modules, dense), config)) as checkpoint:
        assert checkpoint.quantized == ("a.k", "a.q", "lm_head")
        assert checkpoint.dense == ("a.v.weight",)
        assert [checkpoint.plan(name).group for name in checkpoint.quantized] == [64, 32, 32]
        assert checkpoint.plan("a.q").scheme.act_order
        checkpoint.weight("a.k")
    rules[r"+:.*\.k"] = {"bits": 8}
    formats.write_folder(tmp_path, formats.named(modules, dense), config)
    with pytest.raises(Unsupported, match=r"\.bits: got 8, wanted 4"):
        open_checkpoint(tmp_path)


def test_groups_of_compressed_tensors(tmp_path: Path) -> None:
    sizes = {"model.layers.0.a": 32, "model.layers.0.b": 64, "model.layers.1.a": -1, "model.layers.1.b": 128}
    modules = {
        name: formats.compressed_tensors(formats.make(8, 128, 128 if g == -1 else g, symmetric=True), symmetric=True)
        for name, g in sizes.items()
    }
    config = formats.ct_config(
        formats.ct_group(128, targets=("Linear",), symmetric=True),
        formats.ct_group(64, targets=(r"re:.*layers\.0\.",), symmetric=True),
        formats.ct_group(32, targets=("model.layers.0.a",), symmetric=True),
        formats.ct_group(-1, targets=(r"re:.*layers\.1\.a$", "Nothing"), symmetric=True),
        format="mixed-precision",
        kv_cache_scheme={"num_bits": 8, "type": "float"},
    )
    cache = {"model.layers.0.self_attn.k_scale": torch.ones(1), "model.layers.0.v_proj.output_scale": torch.ones(1)}
    formats.write_folder(tmp_path, formats.named(modules, cache), config)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: checkpoint.plan(name).scheme.group for name in checkpoint.quantized} == sizes
        assert checkpoint.dense == ()
        assert set(checkpoint.ignored) == set(cache)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts(tmp_path: Path, names: tuple[str, str, str], format: str, symmetric: bool) -> None:
    count, wide, narrow = 11, 64, 32
    shapes = ((narrow, wide), (narrow, wide), (wide, narrow))
    weights = {
        f"{EXPERTS}.{e}.{name}": random_weight(*shape, group=32, asym=not symmetric)
        for e in range(count)
        for name, shape in zip(names, shapes, strict=True)
    }
    write_checkpoint(
        tmp_path / "m", format=format, config={}, scheme=Scheme(32, symmetric), items=weights.items(), shard_bytes=9000
    )
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.expert_prefixes == (EXPERTS,)
        upper, lower = checkpoint.experts(EXPERTS)
    gate, up, down = ([weights[f"{EXPERTS}.{e}.{name}"] for e in range(count)] for name in names)
    for got, wanted in (
        (upper, stack_experts([concat_rows([a, b]) for a, b in zip(gate, up, strict=True)])),
        (lower, stack_experts(down)),
    ):
        assert got.experts == count
        assert torch.equal(got.codes, wanted.codes)
        assert torch.equal(got.scales, wanted.scales)
        assert (got.zeros is None) == symmetric
        assert symmetric or (
            wanted.zeros is not None and got.zeros is not None and torch.equal(got.zeros, wanted.zeros)
        )


def experts_folder(folder: Path, change: Any = None, **config: Any) -> Path:
    """Two GPTQ experts, of which `change` edits the plain weights by (expert, projection)."""
    shapes = {"gate_proj": (16, 64), "up_proj": (16, 64), "down_proj": (64, 16)}
    plain = {
        (e, name): formats.make(*shape, 16, symmetric=True, act_order=False)
        for e in (0, 1)
        for name, shape in shapes.items()
    }
    if change is not None:
        change(plain)
    modules = {f"{EXPERTS}.{e}.{name}": formats.gptq(weight, version=1) for (e, name), weight in plain.items()}
    return formats.write_folder(folder, formats.named(modules), formats.gptq_config(16, sym=True, **config))


def test_experts_with_one_order_and_with_zero_points_in_one(tmp_path: Path) -> None:
    def change(plain: dict[Any, formats.Plain]) -> None:
        order = torch.tensor(plain[1, "up_proj"].g_idx)[torch.randperm(64)].tolist()
        plain[1, "up_proj"].g_idx = plain[1, "gate_proj"].g_idx = order
        plain[1, "gate_proj"].zeros[0][0] = 3

    with open_checkpoint(experts_folder(tmp_path, change)) as checkpoint:
        upper, lower = checkpoint.experts(EXPERTS)
        dense = upper.dequantize()
        for e in (0, 1):
            for row, name in enumerate(("gate_proj", "up_proj")):
                weight = checkpoint.weight(f"{EXPERTS}.{e}.{name}").dequantize()
                assert torch.equal(dense[e, 16 * row : 16 * row + 16], weight)
    assert upper.zeros is not None
    assert int(upper.zeros[1, 0, 0]) == 3
    assert (upper.zeros[0] == 8).all()
    assert upper.perm is not None
    assert upper.perm[0].tolist() == list(range(64))
    assert lower.zeros is None
    assert lower.perm is None


def test_experts_that_do_not_fit_together(tmp_path: Path) -> None:
    def disorder(plain: dict[Any, formats.Plain]) -> None:
        plain[1, "up_proj"].g_idx = plain[1, "up_proj"].g_idx[::-1]

    with pytest.raises(Unsupported, match=r"different act-order permutations in .*1\.gate_proj and .*1\.up_proj"):
        open_checkpoint(experts_folder(tmp_path / "a", disorder)).experts(EXPERTS)

    def drop(plain: dict[Any, formats.Plain]) -> None:
        del plain[0, "down_proj"]

    with pytest.raises(BadCheckpoint, match=r"experts\.0\.down_proj: got no 4-bit weight, wanted one"):
        open_checkpoint(experts_folder(tmp_path / "b", drop)).experts(EXPERTS)

    def resize(plain: dict[Any, formats.Plain]) -> None:
        plain[1, "gate_proj"] = formats.make(24, 64, 16, symmetric=True)

    with pytest.raises(BadCheckpoint, match=r"1\.gate_proj: got N=24 K=64 group=16, wanted N=16 K=64 group=16"):
        open_checkpoint(experts_folder(tmp_path / "c", resize)).experts(EXPERTS)

    def recast(plain: dict[Any, formats.Plain]) -> None:
        plain[1, "down_proj"].scales = plain[1, "down_proj"].scales.bfloat16()

    with pytest.raises(BadCheckpoint, match=r"1\.down_proj scales: got torch.bfloat16, wanted torch.float16"):
        open_checkpoint(experts_folder(tmp_path / "d", recast)).experts(EXPERTS)


def items(count: int = 3) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    yield "model.embed_tokens.weight", torch.randn(32, 64).bfloat16()
    for index in range(count):
        yield f"model.layers.{index}.proj", random_weight(64, 64, group=32, asym=True)
    yield "model.norm.weight", torch.ones(64)


def test_shards_index_and_extra_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
    ):
        (source / name).write_text(name)
    for name in (
        "config.json",
        "quantize_config.json",
        "model.safetensors",
        "x.bin",
        ".hidden",
        "model.safetensors.index.json",
    ):
        (source / name).write_text("no")
    config = {"a": 1, "quantization_config": {"old": 1}, "text_config": {"b": 2, "quantization_config": {"old": 1}}}
    out = tmp_path / "deep/out"
    write_checkpoint(
        out, format="compressed-tensors", config=config, scheme=Scheme(32, False), items=items(),
        ignore=["lm_head"], extra_files_from=source, shard_bytes=5000,
    )  # fmt: skip
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    shards = [name for name in names if name.startswith("model-")]
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(names) - set(shards) == {
        "additional_chat_templates/a.jinja", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert config["quantization_config"] == {"old": 1}
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.config["text_config"] == {"b": 2}
        assert checkpoint.config["quantization_config"]["ignore"] == ["lm_head"]
        assert len(checkpoint.quantized) == 3
        assert len(checkpoint.dense) == 2
    assert index["metadata"]["total_size"] == sum((out / shard).stat().st_size for shard in shards) - sum(
        8 + int.from_bytes((out / shard).read_bytes()[:8], "little") for shard in shards
    )


def test_convert_keeps_dense_modules_and_files(tmp_path: Path) -> None:
    modules = {"model.layers.0.q": gptq_parts(16, 64, 32)}
    dense = {"model.embed.weight": torch.randn(8, 64), "model.layers.0.gate.weight": torch.randn(4, 64)}
    formats.write_folder(tmp_path / "a", formats.named(modules, dense), formats.gptq_config(32, sym=True))
    (tmp_path / "a/tokenizer.json").write_text("t")
    told: list[tuple[int, int]] = []
    convert(tmp_path / "a", tmp_path / "b", "compressed-tensors", progress=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (tmp_path / "b/tokenizer.json").read_text() == "t"
    with open_checkpoint(tmp_path / "b") as checkpoint:
        assert set(checkpoint.config["quantization_config"]["ignore"]) == {
            "model.embed",
            "model.layers.0.gate",
            "lm_head",
        }
    convert(tmp_path / "b", tmp_path / "c", "awq")
    convert(tmp_path / "c", tmp_path / "d", "gptq")
    with open_checkpoint(tmp_path / "c") as checkpoint:
        assert "lm_head" in checkpoint.config["quantization_config"]["modules_to_not_convert"]
    with open_checkpoint(tmp_path / "d") as checkpoint:
        assert r"-:^model\.layers\.0\.gate$" in checkpoint.config["quantization_config"]["dynamic"]
        assert torch.equal(checkpoint.tensor("model.embed.weight"), dense["model.embed.weight"])


@pytest.mark.parametrize("to", ["awq", "gptq"])
def test_mixed_groups_are_refused_at_once(tmp_path: Path, to: str) -> None:
    taken = []

    def mixed() -> Iterator[tuple[str, QuantizedWeight]]:
        for index in range(9):
            taken.append(index)
            yield f"m{index}", random_weight(16, 64, group=32 if index else 64)

    with pytest.raises(Unsupported, match=r"got group sizes \[32, 64\], wanted one for the whole model"):
        write_checkpoint(tmp_path / "out", format=to, config={}, scheme=Scheme(64, True), items=mixed())
    assert taken == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    class Interrupt(BaseException):
        pass

    def failing() -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        yield from items(6)
        assert len(list(tmp_path.iterdir())) == 1, "written beside, not in place"
        assert not (tmp_path / "out").exists()
        raise Interrupt

    with pytest.raises(Interrupt):
        write_checkpoint(
            tmp_path / "out", format="awq", config={}, scheme=Scheme(32, False), items=failing(), shard_bytes=4000
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match=r"model.norm.weight: got it twice, wanted each tensor once"):
        write_checkpoint(
            tmp_path / "out", format="awq", config={}, scheme=Scheme(32, False), items=[*items(), *items(0)][-3:]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_source_leaves_no_copy(tmp_path: Path) -> None:
    parts = gptq_parts(16, 64, 32)
    parts["scales"][1, 3] = float("nan")
    formats.write_folder(tmp_path / "a", formats.named({"m": parts}), formats.gptq_config(32))
    with pytest.raises(BadCheckpoint, match=r"m\.scales values: got NaN"):
        convert(tmp_path / "a", tmp_path / "b", "awq")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_where_a_checkpoint_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    for name in ("empty", "new"):
        write_checkpoint(tmp_path / name, format="awq", config={}, scheme=Scheme(32, False), items=items())
        open_checkpoint(tmp_path / name)
    for name in ("full", "full/x", "empty"):
        with pytest.raises(BadInput, match="got a path in use, wanted a new folder"):
            write_checkpoint(tmp_path / name, format="awq", config={}, scheme=Scheme(32, False), items=items())
    assert (tmp_path / "full/x").read_text() == "x"
    with pytest.raises(BadInput, match="format: got 'gguf', wanted awq or gptq or compressed-tensors"):
        write_checkpoint(tmp_path / "g", format="gguf", config={}, scheme=Scheme(32, False), items=items())
    with pytest.raises(BadInput, match="format: got 'gguf'"):
        convert(tmp_path / "new", tmp_path / "g", "gguf")


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    shared: list[tuple[str, Tensor | QuantizedWeight]] = [
        ("a", whole), ("b", whole), ("c", whole[2:4]), ("d", whole.t()), ("e", whole.requires_grad_()),
    ]  # fmt: skip
    write_checkpoint(tmp_path / "out", format="gptq", config={}, scheme=Scheme(-1, True), items=shared)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert all(
            torch.equal(checkpoint.tensor(name), tensor) for name, tensor in shared if isinstance(tensor, Tensor)
        )


def test_an_asymmetric_weight_in_a_symmetric_model_keeps_its_zero_points(tmp_path: Path) -> None:
    weights = {"a": random_weight(16, 64, group=32), "b": random_weight(16, 64, group=32, asym=True)}
    for format in FORMATS:
        write_checkpoint(tmp_path / format, format=format, config={}, scheme=Scheme(32, True), items=weights.items())
        with open_checkpoint(tmp_path / format) as checkpoint:
            for name, weight in weights.items():
                got = checkpoint.weight(name)
                assert torch.equal(got.dequantize(), weight.dequantize())
                assert torch.equal(unpack_nibbles(got.codes), unpack_nibbles(weight.codes))
