"""Known devices are data; an unlisted member of a known family takes its figures."""

from __future__ import annotations

import pytest

from w4a16 import DEVICES, BadInput, Unsupported, current_device
from w4a16.device import known_device, of_product


def test_the_known_devices() -> None:
    wanted = "cpu gfx1100 gfx1101 gfx1150 gfx1151 gfx1201 gfx942 sm80 sm86 sm89 sm90 h200 sm100"
    assert list(DEVICES) == wanted.split()


@pytest.mark.parametrize(
    ("arch", "family"), [("cpu", "cpu"), ("gfx1151", "gfx11"), ("gfx942", "gfx9"), ("sm86", "sm8"), ("sm100", "sm10")]
)
def test_family(arch: str, family: str) -> None:
    assert known_device(arch).family == family


def test_gpu_figures_are_positive() -> None:
    for device in DEVICES.values():
        if device.type != "cpu":
            assert min(device.compute_units, device.shared_bytes, device.registers) > 0
            assert min(device.matrix_flops, device.memory_bytes_per_s) > 1e10


@pytest.mark.parametrize(("arch", "like"), [("gfx1103", "gfx1100"), ("sm87", "sm80"), ("sm103", "sm100")])
def test_an_unlisted_arch_takes_its_family(arch: str, like: str) -> None:
    device = known_device(arch)
    assert device.arch == arch
    assert like in device.model
    assert device.compute_units == DEVICES[like].compute_units


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "sm90"), ("NVIDIA GH200 480GB", "sm90"), ("", "sm90")],
)
def test_a_product_with_figures_of_its_own(gpu: str, name: str) -> None:
    found = of_product(known_device("sm90"), gpu)
    assert (found.name, found.arch, found.family) == (name, "sm90", "sm9")
    assert of_product(known_device("sm100"), gpu).name == "sm100"


def test_an_unknown_arch_lists_the_known() -> None:
    with pytest.raises(BadInput, match="gfx1151"):
        known_device("tpu7")


def test_this_machine() -> None:
    assert current_device("cpu").arch == "cpu"
    with pytest.raises(Unsupported, match="meta"):
        current_device("meta")
