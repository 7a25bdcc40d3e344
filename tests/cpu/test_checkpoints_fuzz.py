"""Sound checkpoint folders, damaged at random: reading and converting them succeed or raise an exception of ours."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import formats
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from w4a16.checkpoints import FORMATS, convert, open_checkpoint
from w4a16.errors import W4A16Error

EXAMPLES = 300
DTYPES = (torch.int32, torch.int64, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool)

WORDS = ("awq", "gptq", "gptq_v2", "compressed-tensors", "pack-quantized", "channel", "re:(", "re:.*", "I32")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One folder per kind: each format, act-order, channel-wise, per-module rules, experts, shards."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sound")
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in (0, 1) for p in ("gate", "up", "down")]
    names.append("model.layers.0.self_attn.q_proj")
    dense = {"lm_head.weight": torch.randn(8, 32), "model.norm.weight": torch.ones(32)}

    def model(pack: Callable[[formats.Plain], dict[str, Any]], group: int, **kind: Any) -> dict[str, Any]:
        weights = {name: formats.make(32, 32, group, **kind) for name in names}
        for weight in weights.values():
            weight.g_idx = weights[names[0]].g_idx  # the projections of one expert share their order
        return formats.named({name: pack(weight) for name, weight in weights.items()}, dense)

    def ct(plain: formats.Plain) -> dict[str, Any]:
        return formats.compressed_tensors(plain, symmetric=False)

    rules = {"-:lm_head": {}, "+:.*q_proj": {"group_size": 16}}
    two = [formats.ct_group(16, symmetric=False), formats.ct_group(16, targets=("re:.*q_proj",), symmetric=False)]
    folders = {
        "awq": (model(formats.awq, 16, symmetric=False), formats.awq_config(16)),
        "gptq": (
            model(lambda w: formats.gptq(w, version=1), 16, symmetric=True),
            formats.gptq_config(16, dynamic=rules),
        ),
        "order": (
            model(lambda w: formats.gptq(w, version=2), 8, symmetric=False, act_order=True),
            formats.gptq_config(8, desc_act=True, checkpoint_format="gptq_v2"),
        ),
        "ct": (model(ct, 16, symmetric=False), formats.ct_config(*two)),
        "channel": (model(ct, 32, symmetric=False), formats.ct_config(formats.ct_group(-1, symmetric=False))),
    }
    return [
        formats.write_folder(root / name, tensors, config, shards=2 if name in ("awq", "ct") else 1)
        for name, (tensors, config) in folders.items()
    ]


def pick(data: st.DataObject, folder: Path, pattern: str) -> Path:
    return data.draw(st.sampled_from(sorted(folder.glob(pattern))))


def flip_bytes(data: st.DataObject, folder: Path) -> None:
    """In the text of a file, or in the values behind its header."""
    path = pick(data, folder, "*")
    content = bytearray(path.read_bytes())
    text = 8 + struct.unpack("<Q", content[:8])[0] if path.suffix == ".safetensors" else len(content)
    first, last = data.draw(st.sampled_from([(0, text), (text, len(content))]))
    for _ in range(data.draw(st.integers(1, 4))):
        if first < last:
            byte = data.draw(st.integers(0, 255) if first else st.sampled_from(b'0123456789{}[],:" -e'))
            content[data.draw(st.integers(first, last - 1))] = byte
    path.write_bytes(content)


def truncate(data: st.DataObject, folder: Path) -> None:
    path = pick(data, folder, "*")
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])


def remove_file(data: st.DataObject, folder: Path) -> None:
    pick(data, folder, "*").unlink()


def edit_json(data: st.DataObject, values: Any) -> None:
    """Replaces, removes or adds one value somewhere in a JSON object."""
    while isinstance(values, dict) and values:
        key = data.draw(st.sampled_from(sorted(values)))
        deeper = isinstance(values[key], dict) and bool(values[key]) and data.draw(st.integers(0, 9)) > 1
        if deeper:
            values = values[key]
            continue
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del values[key]
        else:
            values[key if action == "replace" else data.draw(st.text(max_size=5))] = data.draw(json_values)
        return


def edit_configuration(data: st.DataObject, folder: Path) -> None:
    path = pick(data, folder, "*.json")
    values = json.loads(path.read_text())
    edit_json(data, values)
    path.write_text(json.dumps(values))


def edit_header(data: st.DataObject, folder: Path) -> None:
    path = pick(data, folder, "*.safetensors")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit_json(data, header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit_tensor(data: st.DataObject, folder: Path) -> None:
    path = pick(data, folder, "*.safetensors")
    tensors = load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    action = data.draw(st.sampled_from(["drop", "cast", "cut", "turn", "poke", "rename", "grow"]))
    if action == "cast":
        tensors[name] = tensor.to(data.draw(st.sampled_from(DTYPES)))
    elif action == "cut":
        tensors[name] = tensor[: data.draw(st.integers(0, len(tensor)))].contiguous()
    elif action == "turn":
        tensors[name] = tensor.flatten() if tensor.ndim == 1 else tensor.t().contiguous()
    elif action == "poke":
        value = data.draw(st.sampled_from([float("nan"), float("inf"), 0, -1, 1, 7, 1000]))
        with suppress(ValueError, OverflowError, RuntimeError):  # NaN into integers
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
        tensors[name] = tensor
    elif action == "rename":
        module, _, suffix = name.rpartition(".")
        tensors[data.draw(st.sampled_from([f"{module}.weight", f"{module}.9.{suffix}", suffix, f"x.{suffix}"]))] = (
            tensor
        )
    elif action == "grow":
        tensors[name] = torch.cat([tensor, tensor])
    save_file(tensors, path)


MUTATIONS = (
    flip_bytes,
    truncate,
    remove_file,
    edit_configuration,
    edit_configuration,
    edit_header,
    edit_tensor,
    edit_tensor,
)


def read_all(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.dense:
            checkpoint.tensor(name)
        for module in checkpoint.quantized:
            weight = checkpoint.weight(module)
            assert torch.isfinite(weight.dequantize(torch.float32)).all()
        for prefix in checkpoint.expert_prefixes:
            checkpoint.experts(prefix)


def test_undamaged_folders_read(sound: list[Path]) -> None:
    for folder in sound:
        read_all(folder)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damage_raises_only_our_exceptions(sound: list[Path], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(data.draw(st.sampled_from(sound)), folder)
        for _ in range(data.draw(st.integers(1, 2))):
            mutate = data.draw(st.sampled_from(MUTATIONS))
            # a second mutation may meet a file that the first has already ruined
            with suppress(Exception):
                mutate(data, folder)
        message = ""
        try:
            read_all(folder)
        except W4A16Error as error:
            message = str(error)
        assert not message or str(folder) in message
        out = Path(temporary) / "out"
        try:
            convert(folder, out, data.draw(st.sampled_from(sorted(FORMATS))))
        except W4A16Error:
            assert [path.name for path in Path(temporary).iterdir()] == ["model"]
        else:
            if not message:
                read_all(out)
