"""`w4a16 device`: what it measures and keeps, on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from w4a16 import cli_device
from w4a16.device import DEVICES, gpu_name, product_name
from w4a16.roofline import measure as measuring
from w4a16.roofline.peaks import Peaks, file_of, load


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take no time."""
    monkeypatch.setattr(measuring, "MEMORY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(measuring, "MATRIX_SIDE", {"cpu": {"bf16": 32, "fp16": 32, "fp32": 64}})
    monkeypatch.setattr(measuring, "SMALL", 10)
    monkeypatch.setattr(measuring, "ROUNDS", 2)


@pytest.mark.usefixtures("small")
def test_the_figures_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_device.main(["--device", "cpu", "--save", "--folder", str(tmp_path)]) == 0
    path = file_of("cpu", tmp_path)
    kept = load(path)
    assert kept is not None
    assert kept.machine == measuring.cpu_name() != ""
    assert f"torch {torch.__version__}" in kept.session
    assert set(kept.matrix_flops) == {"bf16", "fp16", "fp32"}
    assert min(*kept.memory_bytes_per_s.values(), *kept.matrix_flops.values(), kept.launch_us, kept.round_trip_us) > 0
    assert kept.graph_us is None
    out = capsys.readouterr().out
    assert f"written to {path}" in out
    assert re.search(r"^memory, scale, GB/s +[\d.]+ +- +-$", out, re.M)


@pytest.mark.usefixtures("small")
def test_nothing_is_kept_unasked(tmp_path: Path) -> None:
    assert cli_device.main(["--device", "cpu", "--folder", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []


def test_measured_beside_published() -> None:
    peaks = Peaks(
        machine="NVIDIA H100 80GB HBM3",
        session="a test",
        memory_bytes_per_s={"copy": 3e12},
        matrix_flops={"bf16": 7e14, "fp32": 5e13},
        launch_us=2.0,
        round_trip_us=9.0,
        graph_us=1.5,
    )
    text = cli_device.as_table(DEVICES["sm90"], peaks)
    assert re.search(r"memory, copy, GB/s +3000 +3350 +89.6 %", text)
    assert re.search(r"bf16, TFLOP/s +700 +989 +70.8 %", text)
    assert re.search(r"fp32, TFLOP/s +50 +- +-", text)
    assert re.search(r"in a graph, us +1.500$", text)


def test_an_unknown_device_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_device.main(["--device", "meta"]) == 1
    assert capsys.readouterr().err.startswith("Unsupported: ")


@pytest.mark.parametrize(
    ("gpu", "word"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("AMD Radeon RX 7900 XTX", "rx7900xtx"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("", "cpu"),
    ],
)
def test_a_gpu_as_one_word(gpu: str, word: str) -> None:
    assert product_name(gpu) == word


@pytest.mark.skipif(gpu_name() != "", reason="this machine has a GPU")
def test_without_a_gpu() -> None:
    assert product_name() == "cpu"
