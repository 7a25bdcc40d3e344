"""Every kernel that production can choose, compiled for every known GPU by the oldest and the newest Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from w4a16.codegen import golden
from w4a16.codegen.cases import cases, unreached
from w4a16.device import known_device
from w4a16.tuning.tiles import why_illegal

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.6.0", "3.9.0")  # the oldest and the newest Triton that w4a16 supports
# Those with rows of their own; a table of a family is compiled for one of it at least.
ARCHS = (*golden.DEVICES, "h200", "gfx1150", "gfx1103", "gfx1201", "gfx942", "sm80")
LINE = dict.fromkeys(golden.COLUMNS, "0") | {"kernel": "triton_prefill", "tile": "block_m=64", "opcodes": "v_a:8 v_b:1"}


def read_with(version: str, folder: Path) -> dict[str, list[golden.Line]]:
    """What `w4a16 isa-golden` reads of the kernels of ARCHS with another Triton than this process has."""
    triton = ROOT / ".triton" / version
    assert triton.is_dir(), (
        f"{triton}: got no such folder, wanted Triton {version}. Run `make test`, which installs it."
    )
    devices = [f"--device={arch}" for arch in ARCHS]
    command = [Path(sys.executable).with_name("w4a16"), "isa-golden", *devices, "--folder", folder, "--update"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(triton)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {arch: golden.load(folder / arch / f"{version}.csv") for arch in ARCHS}


def faults(line: golden.Line, arch: str) -> list[str]:
    """What may not be: spills, more registers or LDS than there are, a GEMM without matrix instructions."""
    device = known_device(arch)
    found = [f"{name}={line[name]}" for name in ("spills", "scratch_bytes") if line[name] != "0"]
    for name, limit in (("shared_bytes", device.shared_bytes), ("registers", device.registers)):
        if int(line[name]) > limit:
            found.append(f"{name}={line[name]}, at most {limit}")
    gemms = ("_triton_prefill", "_triton_decode", "_triton_moe", "_gfx11_prefill", "_gfx11_moe", "_sm90_moe")
    if line["symbol"] in gemms and line["matrix"] == "0":
        found.append("no matrix instructions")
    counts = golden.opcode_counts(line["opcodes"])
    wgmma, waits = (sum(n for op, n in counts.items() if op.startswith(name)) for name in ("HGMMA", "WARPGROUP.DEPBAR"))
    if line["symbol"] in ("_sm90_prefill", "_sm90_moe") and waits >= wgmma:
        found.append(f"ptxas serialised wgmma: {wgmma} of them, {waits} waits")
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tile_compiles_within_limits_and_as_recorded(version: str, tmp_path: Path) -> None:
    wrong = []
    for arch, lines in read_with(version, tmp_path).items():
        for line in lines:
            wrong += [f"{arch} {' '.join(line[name] for name in golden.KEY)}: {fault}" for fault in faults(line, arch)]
        if arch in golden.DEVICES:
            path = ROOT / "golden" / "isa" / arch / f"{version}.csv"
            wrong += [f"{arch} {sentence}" for sentence in golden.differences(golden.load(path), lines)]
    assert not wrong, f"Triton {version}:\n" + "\n".join(wrong)


def test_every_row_for_production_is_compiled() -> None:
    missed = unreached(known_device(arch) for arch in ARCHS)
    assert not missed, f"give codegen/cases.py a problem that gets these rows: {missed}"


def test_every_tile_that_is_compiled_is_legal() -> None:
    for device in map(known_device, ARCHS):
        for case in cases(device):
            assert why_illegal(case.row.stem, case.row.tile, case.problem, device) is None, (device.arch, case)


def test_a_change_is_named_by_opcode_and_resource() -> None:
    changed = LINE | {"opcodes": "v_a:6 v_c:2 v_b:1", "registers": "128"}
    (sentence,) = golden.differences([LINE], [changed])
    assert sentence.endswith("registers 0 -> 128, v_a 8 -> 6, v_c 0 -> 2")
    assert golden.differences([LINE], [LINE]) == []


def test_new_and_missing_kernels_are_named() -> None:
    other = LINE | {"tile": "block_m=128"}
    assert [s.split(": ")[-1] for s in golden.differences([LINE], [other])] == ["no longer compiled", "not recorded"]


def test_lines_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gfx1151" / "3.9.0.csv"
    golden.write([LINE], path)
    assert golden.load(path) == [LINE]
    assert golden.opcode_counts(LINE["opcodes"]) == {"v_a": 8, "v_b": 1}
