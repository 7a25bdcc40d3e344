"""Bad checkpoints: each is one exception of ours that names the file and the tensor, what was got and wanted."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats
import pytest
import torch
from torch import Tensor

from w4a16.checkpoints import open_checkpoint
from w4a16.errors import BadCheckpoint, Unsupported, W4A16Error

MODULE = "model.layers.0.proj"
FILE = "model.safetensors"
Tensors = dict[str, Tensor]
Config = dict[str, Any]


def folder_of(kind: str, folder: Path, change: Callable[[Tensors, Config], None] | None = None, **more: Any) -> Path:
    """A sound checkpoint of one quantised module [16, 64] in groups of 32 and a norm, edited by `change`."""
    plain = formats.make(16, 64, 32, symmetric=False, act_order=kind == "ordered")
    tensors, config = {
        "awq": lambda: (formats.awq(plain), formats.awq_config(32)),
        "gptq": lambda: (formats.gptq(plain, version=1), formats.gptq_config(32)),
        "ordered": lambda: (formats.gptq(plain, version=1), formats.gptq_config(32, desc_act=True)),
        "ct": lambda: (
            formats.compressed_tensors(plain, symmetric=False),
            formats.ct_config(formats.ct_group(32, symmetric=False)),
        ),
    }[kind]()
    if change is not None:
        change(tensors, config)
    return formats.write_folder(
        folder, formats.named({MODULE: tensors}, {"model.norm.weight": torch.ones(64)}), config, **more
    )


def read_all(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.dense:
            checkpoint.tensor(name)
        for module in checkpoint.quantized:
            checkpoint.weight(module)
        for prefix in checkpoint.expert_prefixes:
            checkpoint.experts(prefix)


def refused(folder: Path, *parts: str, kind: type[W4A16Error] = BadCheckpoint) -> str:
    """Reads the folder; the exception must be of `kind` and its message hold every one of `parts`."""
    with pytest.raises(W4A16Error) as caught:
        read_all(folder)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    for part in (str(folder), "got ", "wanted ", *parts):
        assert part in message, message
    assert message.endswith("."), message
    return message


@pytest.mark.parametrize("kind", ["awq", "gptq", "ordered", "ct"])
def test_the_folders_here_are_sound(tmp_path: Path, kind: str) -> None:
    read_all(folder_of(kind, tmp_path))


def put(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, _: Config) -> None:
        tensors[name] = edit(tensors[name].clone())

    return change


def poke(name: str, value: float) -> Callable[[Tensors, Config], None]:
    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return put(name, edit)


CODES = {"awq": "qweight", "gptq": "qweight", "ordered": "qweight", "ct": "weight_packed"}
SCALES = {"awq": "scales", "gptq": "scales", "ordered": "scales", "ct": "weight_scale"}
ZEROS = {"awq": "qzeros", "gptq": "qzeros", "ordered": "qzeros", "ct": "weight_zero_point"}
EVERY = [(kind, names[kind]) for kind in ("awq", "gptq", "ct") for names in (CODES, SCALES, ZEROS)]
OTHERS = [("ordered", "g_idx"), ("ct", "weight_shape")]


@pytest.mark.parametrize(("kind", "name"), EVERY + OTHERS)
def test_a_wrong_dtype(tmp_path: Path, kind: str, name: str) -> None:
    refused(folder_of(kind, tmp_path, put(name, lambda t: t.double())), FILE, f"{MODULE}.{name} dtype", "got F64")


@pytest.mark.parametrize(("kind", "name"), EVERY + OTHERS)
@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t[:-1],
        lambda t: torch.cat([t, t]),
        lambda t: t[None],
        lambda t: t.flatten()[0],
        lambda t: t[:0],
        lambda t: t[..., :-1],
        lambda t: torch.cat([t, t], -1),
    ],
    ids=["fewer-rows", "more-rows", "more-dimensions", "scalar", "empty", "fewer-columns", "more-columns"],
)
def test_a_wrong_shape(tmp_path: Path, kind: str, name: str, edit: Callable[[Tensor], Tensor]) -> None:
    message = refused(folder_of(kind, tmp_path, put(name, edit)), FILE, MODULE)
    if name not in CODES.values():  # wrong codes imply another N or K, so another tensor may be the first that differs
        assert f"{MODULE}.{name}" in message or "weight_shape" in name


@pytest.mark.parametrize(("kind", "name"), EVERY + OTHERS)
def test_a_missing_tensor(tmp_path: Path, kind: str, name: str) -> None:
    def change(tensors: Tensors, _: Config) -> None:
        del tensors[name]

    refused(folder_of(kind, tmp_path, change), FILE, f"{MODULE}.{name}: got no such tensor", name)


@pytest.mark.parametrize("kind", ["awq", "gptq", "ct"])
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (0.0, "got a zero")])
def test_scales_that_would_poison(tmp_path: Path, kind: str, value: float, said: str) -> None:
    refused(folder_of(kind, tmp_path, poke(SCALES[kind], value)), FILE, f"{MODULE}.{SCALES[kind]} values", said)


@pytest.mark.parametrize(
    ("value", "said"),
    [(2, "got 2, wanted groups 0 to 1"), (-1, "got -1, wanted groups 0 to 1"), (None, "columns in group")],
)
def test_g_idx_out_of_range(tmp_path: Path, value: int | None, said: str) -> None:
    def change(tensors: Tensors, _: Config) -> None:
        g_idx = tensors["g_idx"]
        g_idx[3] = 1 - int(g_idx[3]) if value is None else value

    refused(folder_of("ordered", tmp_path, change), FILE, f"{MODULE}.g_idx values", said)


def test_int8_zero_points_out_of_range(tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> None:
        tensors["weight_zero_point"] = torch.full((16, 2), 8, dtype=torch.int8)

    refused(folder_of("ct", tmp_path, change), f"{MODULE}.weight_zero_point values: got 8 to 8, wanted -8 to 7")


@pytest.mark.parametrize("kind", ["awq", "gptq"])
@pytest.mark.parametrize(
    ("key", "value", "said", "error"),
    [
        ("bits", 8, "bits: got 8, wanted 4", Unsupported),
        ("bits", "4", "bits: got '4', wanted 4", BadCheckpoint),
        ("bits", True, "bits: got True, wanted 4", BadCheckpoint),
        ("bits", None, "bits: got nothing, wanted 4", BadCheckpoint),
        ("group_size", 48, "group size: got 48 for K=64, wanted a divisor of 64", BadCheckpoint),
        ("group_size", 0, "group_size: got 0, wanted a positive number or -1", BadCheckpoint),
        ("group_size", -2, "group_size: got -2", BadCheckpoint),
        ("group_size", 32.0, "group_size: got 32.0", BadCheckpoint),
        ("group_size", None, "group_size: got nothing", BadCheckpoint),
        ("group_size", 64, "scales shape: got [2, 16], wanted [1, 16]", BadCheckpoint),
        ("group_size", -1, "scales shape: got [2, 16], wanted [1, 16]", BadCheckpoint),
        ("quant_method", "fp8", "quant_method: got 'fp8', wanted awq or gptq or compressed-tensors", Unsupported),
        ("quant_method", None, "quant_method: got nothing, wanted awq or gptq", BadCheckpoint),
        ("quant_method", ["awq"], "quant_method: got ['awq']", BadCheckpoint),
        ("quant_method", "compressed-tensors", "config_groups: got None, wanted a JSON object", BadCheckpoint),
    ],
)
def test_configurations(tmp_path: Path, kind: str, key: str, value: object, said: str, error: type[W4A16Error]) -> None:
    refused(folder_of(kind, tmp_path, lambda _, config: config.update({key: value})), said, kind=error)


@pytest.mark.parametrize(
    ("kind", "key", "value", "said", "error"),
    [
        ("awq", "version", "gemv", "version: got 'gemv', wanted 'gemm'", Unsupported),
        ("awq", "version", 1, "version: got 1, wanted a string", BadCheckpoint),
        ("awq", "zero_point", "yes", "zero_point: got 'yes', wanted true or false", BadCheckpoint),
        ("gptq", "checkpoint_format", "marlin", "got 'marlin', wanted 'gptq' or 'gptq_v2'", Unsupported),
        ("gptq", "is_marlin_format", True, "wanted 'gptq' or 'gptq_v2'", Unsupported),
        ("gptq", "pack_dtype", "int64", "pack_dtype: got 'int64', wanted 'int32'", Unsupported),
        ("gptq", "sym", 1, "sym: got 1, wanted true or false", BadCheckpoint),
        ("gptq", "dynamic", [1], "dynamic: got [1], wanted a JSON object", BadCheckpoint),
        ("gptq", "dynamic", {"(": {}}, "got '('", BadCheckpoint),
        ("gptq", "dynamic", {".*": 3}, ".*: got 3, wanted a JSON object", BadCheckpoint),
        ("gptq", "dynamic", {".*": {"bits": 3}}, ".*.bits: got 3, wanted 4", Unsupported),
        (
            "ct",
            "format",
            "nvfp4-pack-quantized",
            "format: got 'nvfp4-pack-quantized', wanted 'pack-quantized'",
            Unsupported,
        ),
        ("ct", "format", "marlin-24", "got 'marlin-24'", Unsupported),
        ("ct", "config_groups", None, "config_groups: got None", BadCheckpoint),
        ("ct", "config_groups", {"g": ["Linear"]}, "config_groups.g: got ['Linear']", BadCheckpoint),
        ("ct", "config_groups", {}, f"config_groups: got no group for {MODULE}, wanted one", BadCheckpoint),
        ("ct", "transform_config", {"R1": {}}, "transform_config: got a value, wanted nothing", Unsupported),
        ("ct", "sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config: got a value", Unsupported),
    ],
)
def test_configurations_of_one_format(
    tmp_path: Path, kind: str, key: str, value: object, said: str, error: type[W4A16Error]
) -> None:
    refused(folder_of(kind, tmp_path, lambda _, config: config.update({key: value})), said, kind=error)


@pytest.mark.parametrize(
    ("path", "value", "said", "error"),
    [
        ("input_activations", {"num_bits": 8}, "input_activations: got a value, wanted null", Unsupported),
        ("output_activations", {"num_bits": 8}, "output_activations: got a value, wanted null", Unsupported),
        ("format", "float-quantized", "group_0.format: got 'float-quantized'", Unsupported),
        ("targets", "Linear", "targets: got 'Linear', wanted a list of names", BadCheckpoint),
        ("targets", [3], "targets: got [3], wanted a list of names", BadCheckpoint),
        ("targets", ["re:("], "group_0: got '(' ", BadCheckpoint),
        ("targets", ["model.other"], f"got no group for {MODULE}", BadCheckpoint),
        ("weights", None, "weights: got None, wanted a JSON object", BadCheckpoint),
        ("weights.num_bits", 8, "num_bits: got 8, wanted 4", Unsupported),
        ("weights.num_bits", None, "num_bits: got nothing, wanted 4", BadCheckpoint),
        ("weights.type", "float", "type: got 'float', wanted 'int'", Unsupported),
        ("weights.strategy", "tensor", "strategy: got 'tensor', wanted 'group' or 'channel'", Unsupported),
        ("weights.strategy", "channel", "group_size: got 32, wanted what strategy channel says", BadCheckpoint),
        ("weights.group_size", None, "group_size: got -1, wanted what strategy group says", BadCheckpoint),
        ("weights.group_size", 16, "weight_scale shape: got [16, 2], wanted [16, 4]", BadCheckpoint),
        ("weights.group_size", 48, "weight_packed group size: got 48 for K=64", BadCheckpoint),
        ("weights.symmetric", "no", "symmetric: got 'no'", BadCheckpoint),
        ("weights.actorder", "group", f"{MODULE}.weight_g_idx: got no such tensor", BadCheckpoint),
    ],
)
def test_groups_of_compressed_tensors(
    tmp_path: Path, path: str, value: object, said: str, error: type[W4A16Error]
) -> None:
    def change(_: Tensors, config: Config) -> None:
        *keys, last = path.split(".")
        holder = config["config_groups"]["group_0"]
        for key in keys:
            holder = holder[key]
        holder[last] = value

    refused(folder_of("ct", tmp_path, change), said, kind=error)


def test_k_that_does_not_fill_words(tmp_path: Path) -> None:
    plain = formats.make(8, 20, 20, symmetric=True)
    tensors = formats.named({MODULE: formats.compressed_tensors(plain, symmetric=True)})
    formats.write_folder(tmp_path, tensors, formats.ct_config(formats.ct_group(-1, symmetric=True)))
    refused(tmp_path, FILE, f"{MODULE}.weight_packed: got K=20, wanted a multiple of 8", kind=Unsupported)


def test_a_packed_weight_beside_a_dense_one_and_without_its_configuration(tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> None:
        tensors["weight"] = torch.ones(16, 64)

    refused(folder_of("gptq", tmp_path / "a", change), f"{MODULE}.weight module: got a dense and a packed weight")
    folder = folder_of("gptq", tmp_path / "b")
    (folder / "config.json").write_text("{}")
    refused(folder, FILE, f"{MODULE}.qweight", "quant_method is None")
    folder = folder_of("ct", tmp_path / "c")
    (folder / "config.json").write_text(json.dumps({"quantization_config": formats.awq_config(32)}))
    refused(folder, FILE, f"{MODULE}.weight_packed", "quant_method is awq")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "got JSON of type list, wanted a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b'{"a": 1, "a": 2}', "got the key 'a' twice"),
        (b'{"quantization_config": 4}', "quantization_config: got 4, wanted a JSON object"),
    ],
)
def test_config_json(tmp_path: Path, text: bytes, said: str) -> None:
    folder = folder_of("awq", tmp_path)
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json", said)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"got no such folder, wanted a folder with config\.json"):
        open_checkpoint(tmp_path / "nothing")
    refused(tmp_path, "config.json", "No such file")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "got no *.safetensors file, wanted at least one")
    (tmp_path / "pytorch_model.bin").write_text("x")
    refused(tmp_path, "got pytorch_model.bin, wanted safetensors", kind=Unsupported)
    (tmp_path / FILE).mkdir()
    refused(tmp_path, FILE)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the JSON header of a safetensors file; the data stays."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dtype", "F4", "dtype: got 'F4', wanted one of F64"),
        ("dtype", 3, "dtype: got 3"),
        ("dtype", "F16", "data_offsets: got"),
        ("shape", [-1, 4], "shape: got [-1, 4], wanted a list of lengths"),
        ("shape", "x", "shape: got 'x'"),
        ("shape", [True], "shape: got [True]"),
        ("shape", [1 << 40, 1 << 40], "data_offsets: got"),
        ("shape", [1 << 80], "shape: got"),
        ("data_offsets", [0], "data_offsets: got [0], wanted two offsets"),
        ("data_offsets", None, "data_offsets: got None"),
        ("data_offsets", [8, 0], "data_offsets: got -8 bytes"),
        ("data_offsets", [1 << 40, (1 << 40) + 256], "leaves a gap before it"),
        ("data_offsets", [4, 260], "offset: got"),
    ],
)
def test_entries_of_a_header(tmp_path: Path, field: str, value: object, said: str) -> None:
    folder = folder_of("gptq", tmp_path)

    def change(header: dict[str, Any]) -> None:
        header["model.norm.weight"][field] = value

    edit_header(folder / FILE, change)
    message = refused(folder, FILE, said)
    assert "model.norm.weight" in message or "offset" in said or "gap" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: b"[]", "got JSON of type list"),
        (lambda header: b"{", "not JSON"),
        (lambda header: {"__metadata__": [], **header}, "__metadata__: got no JSON object"),
        (lambda header: {"x": 3, **header}, "x: got 3, wanted dtype, shape and data_offsets"),
        (lambda header: {name: header[name] for name in list(header)[1:]}, "leaves a gap before it"),
        (lambda header: b'{"a": {}, "a": {}}', "got the key 'a' twice"),
    ],
)
def test_headers(tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    folder = folder_of("gptq", tmp_path)
    edit_header(folder / FILE, change)
    refused(folder, FILE, said)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1, -100])
def test_a_truncated_file(tmp_path: Path, size: int) -> None:
    folder = folder_of("gptq", tmp_path)
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:size])
    refused(folder, FILE, "truncated")


def test_a_file_with_bytes_at_its_end_or_cut_after_it_was_opened(tmp_path: Path) -> None:
    folder = folder_of("gptq", tmp_path)
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data + b"x")
    refused(folder, FILE, "the end of its last tensor")
    (folder / FILE).write_bytes(data)
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / FILE, 300)
    with pytest.raises(BadCheckpoint, match=r"got 0 bytes before the file ended, wanted \d+ bytes"):
        checkpoint.weight(MODULE)
    (folder / FILE).unlink()
    with pytest.raises(BadCheckpoint, match="No such file"):
        checkpoint.weight(MODULE)


def test_a_header_length_beyond_reason(tmp_path: Path) -> None:
    folder = folder_of("gptq", tmp_path)
    (folder / FILE).write_bytes(b"\xff" * 64)
    refused(folder, FILE, "truncated or not safetensors")


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index) or index))


def test_shards_and_index_that_disagree(tmp_path: Path) -> None:
    folder = folder_of("awq", tmp_path / "missing", shards=2)
    first, second = shard_names(folder)
    (folder / second).unlink()
    refused(folder, second, "got no such file, wanted a shard that the index names")

    folder = folder_of("awq", tmp_path / "ghost", shards=2)
    edit_index(folder, lambda index: index["weight_map"].update(ghost=first))
    refused(folder, f"{first}: ghost: got the tensor in no file")

    folder = folder_of("awq", tmp_path / "moved", shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({f"{MODULE}.qweight": second}))
    refused(folder, f"{second}: {MODULE}.qweight: got the tensor in {first}")

    folder = folder_of("awq", tmp_path / "twice", shards=2)
    (folder / second).write_bytes((folder / first).read_bytes())
    refused(folder, f"{second}: {MODULE}.", f"got the tensor in {first} too, wanted it in one file")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: {"weight_map": None}, "weight_map: got None"),
        (lambda index: {"weight_map": {}}, "weight_map: got {}"),
        (lambda index: {"weight_map": {"a": 3}}, "a: got 3, wanted the name of a safetensors file"),
        (lambda index: {"weight_map": {"a": "../model.safetensors"}}, "got '../model.safetensors'"),
        (lambda index: {"weight_map": {"a": "config.json"}}, "got 'config.json'"),
        (lambda index: {"weight_map": {"\ud800": "a.safetensors"}}, "not JSON"),
        (lambda index: [1], "got JSON of type list"),
    ],
)
def test_an_index(tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    folder = folder_of("awq", tmp_path, shards=2)
    edit_index(folder, change)
    refused(folder, "model.safetensors.index.json", said)


@pytest.mark.parametrize("name", ["x" * 5000, "\0"])
def test_an_index_that_names_a_file_no_disk_could_hold(tmp_path: Path, name: str) -> None:
    folder = folder_of("awq", tmp_path, shards=2)
    edit_index(folder, lambda index: {"weight_map": {"a": f"{name}.safetensors"}})
    refused(folder, name, "got no such file")
