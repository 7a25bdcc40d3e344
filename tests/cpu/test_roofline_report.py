"""The report: rows, bounds, the step, and every form it is written in."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from traces import H100, Recording

from w4a16.device import DEVICES
from w4a16.errors import BadInput
from w4a16.problem import Problem
from w4a16.roofline.command import device_of, main
from w4a16.roofline.model import bytes_moved
from w4a16.roofline.names import W4A16
from w4a16.roofline.peaks import Peaks, load, measured, save
from w4a16.roofline.report import BY, Report, make_report
from w4a16.roofline.shapes import Gemm
from w4a16.roofline.step import step_of
from w4a16.roofline.tables import as_csv, as_table
from w4a16.roofline.trace import Trace, read

DATA = Path(__file__).parent.parent / "data" / "traces"
QKV = Problem(m=1, n=6144, k=4096, group=128, has_zeros=True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two layers of a prompt of 2048 and of one decode step; a kernel of nobody's; idle time."""
    r = Recording()
    for m, stem, us in ((2048, "sm90_prefill", 150.0), (1, "sm90_decode", 9.0)):
        for _ in range(2):
            r.scope(f"{stem} {m}x6144x4096 g=128 asym", (f"_{stem}", us))
            r.within("cpu_op", "aten::scaled_dot_product_attention", ("flash_fwd_kernel", 20.0))
            r.kernel("void at::native::<b>elementwise<4>(int)", 3.0)
        r.operator("aten::mm", [[1, 4096], [4096, 151936]], ("gemv2T_kernel_val", 400.0))
        r.kernel("argmax", 2.0, gap=50.0)
    return r.save(tmp_path / "t.json")


def report_of(path: Path, **options: str) -> Report:
    trace = read(path)
    return make_report(trace, step_of(trace), DEVICES["sm90"], **options)


def test_a_row_adds_up(saved):
    row = next(row for row in report_of(saved).rows if row.name == "sm90_decode")
    bound = bytes_moved(QKV) / 3.35e12 * 1e6
    assert (row.kind, row.calls, row.us, row.known_calls) == (W4A16, 2, 18.0, 2)
    assert row.flops == 2 * 2 * 6144 * 4096
    assert row.bytes == 2 * bytes_moved(QKV)
    assert row.bound_us == pytest.approx(2 * bound)
    assert row.share_of_bound == pytest.approx(bound / 9.0)
    assert row.intensity == pytest.approx(row.flops / row.bytes)
    assert row.tflops == pytest.approx(row.flops / 18e-6 * 1e-12)
    assert row.gb_per_s == pytest.approx(row.bytes / 18e-6 * 1e-9)
    assert row.binds == "memory"
    prefill = next(row for row in report_of(saved).rows if row.name == "sm90_prefill")
    assert prefill.binds == "compute"


@pytest.mark.parametrize("by", ["op", "shape", "kernel"])
@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
def test_rows_add_up_to_the_step(saved, by, phase):
    report = report_of(saved, by=by, phase=phase)
    total = sum(row.us for row in report.rows)
    assert total == pytest.approx(report.step.usage.busy)
    assert total == pytest.approx(sum(report.parts.values()))
    assert sum(row.share for row in report.rows) == pytest.approx(1 - report.step.usage.idle / report.step.usage.window)


def test_phases_cut_the_step(saved):
    names = {row.name for row in report_of(saved, phase="decode").rows}
    assert "sm90_decode" in names
    assert "sm90_prefill" not in names
    whole, cut = report_of(saved).step.usage, [report_of(saved, phase=p).step.usage for p in ("prefill", "decode")]
    assert sum(u.window for u in cut) == pytest.approx(whole.window)


def test_a_phase_that_is_not_there(saved):
    with pytest.raises(BadInput, match="--phase: got a trace with decode, wanted prefill"):
        report_of(DATA / "rocm.json", phase="prefill")


def test_layers_need_ranges(saved):
    with pytest.raises(BadInput, match="--by layer: got no module ranges"):
        report_of(saved, by="layer")
    names = {row.name for row in report_of(DATA / "cpu.json.gz", by="layer").rows}
    assert {"layers.0.qkv", "layers.1.experts", "lm_head"} <= names


def test_padding_of_expert_blocks(tmp_path):
    r = Recording()
    facts = "block_m=16 n_routed=128 experts=77 valid_blocks=80"
    r.scope(f"triton_moe 16x1536x2048 E=128 top_k=8 g=128 sym inter=768 {facts}", ("_triton_moe", 90.0))
    row = report_of(r.save(tmp_path / "t.json")).rows[0]
    assert row.flops == 2 * 128 * 2048 * (1536 + 768)
    assert row.executed_flops == 10 * row.flops  # 80 blocks of 16 rows for 128 slots


def test_a_kernel_row_has_flops_only_when_it_does_the_whole_call(tmp_path):
    r = Recording()
    r.scope("sm90_decode 1x6144x4096 g=128 asym", ("_sm90_decode", 9.0), ("_sm90_decode_reduce", 2.0))
    r.scope("sm90_decode 1x4096x4096 g=128 asym", ("_sm90_decode", 5.0))
    rows = {row.name: row for row in report_of(r.save(tmp_path / "t.json"), by="kernel").rows}
    assert (rows["_sm90_decode"].calls, rows["_sm90_decode"].us) == (2, 14.0)
    assert (rows["_sm90_decode"].known_calls, rows["_sm90_decode"].known_us) == (1, 5.0)
    assert rows["_sm90_decode_reduce"].flops == 0


def test_a_cpu_product_is_one_kernel_with_all_that_it_calls(tmp_path):
    rows = {row.name: row for row in report_of(DATA / "cpu.json.gz", by="kernel").rows}
    assert rows["aten::mm"].calls == rows["aten::mm"].known_calls == 9


def test_notes_say_what_to_doubt(tmp_path):
    r = Recording()
    r.scope("triton_moe 16x1536x2048 E=128 top_k=8 g=128 sym", ("_triton_moe", 90.0))
    r.kernel("nvjet_tst", 5.0)
    r.events.append(dict(r.events[-1]))
    trace = read(r.save(tmp_path / "t.json"))
    notes = "\n".join(make_report(trace, step_of(trace), None).notes)
    for part in ("1 products have no known shape", "in the file twice", "No bounds", "Experts were not counted"):
        assert part in notes


def test_the_table(saved):
    text = as_table(report_of(saved, by="shape"))
    assert "NVIDIA H100 80GB HBM3; bounds of H100 SXM: 989 TFLOP/s, 3350 GB/s" in text
    line = next(line for line in text.splitlines() if line.startswith("sm90_decode 1x6144x4096 g=128 asym"))
    assert line.split()[4:6] == ["2", "0.018"]
    assert line.endswith("memory")
    assert re.search(r"^  idle GPU +0\.\d+ ms +\d+\.\d %$", text, re.M)
    assert "... 4 more rows" in as_table(report_of(saved, by="shape"), top=1)


def test_csv(saved):
    rows = list(csv.DictReader(io.StringIO(as_csv(report_of(saved, by="shape").rows))))
    decode = next(row for row in rows if row["name"].startswith("sm90_decode"))
    assert float(decode["us"]) == 18.0
    assert decode["binds"] == "memory"
    attention = next(row for row in rows if row["name"] == "attention")
    assert attention["share_of_bound"] == ""


class Checker(HTMLParser):
    """Collects tags, insists that they nest, and finds what would ask the network."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_wellformed_file(saved, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert main([str(saved), "--by", "kernel", "--html", str(out), "--csv", str(tmp_path / "r.csv")]) == 0
    text = out.read_text(encoding="utf-8")
    page = Checker()
    page.feed(text)
    assert page.open == []
    assert "$" not in text.replace("${id}", "")
    tags = [tag for tag, _ in page.found]
    assert tags.count("tr") == 1 + len(capsys.readouterr().out.split("\n\n")[1].splitlines()) - 1
    assert tags.count("circle") == 3
    assert not {"link", "img", "iframe"} & set(tags)
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.found)
    assert "http" not in text
    assert "<b>" not in text  # a kernel's name is text
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    circles = list(ElementTree.fromstring(svg).iter("circle"))
    assert all(0 <= float(c.get("cx", "nan")) <= 960 and 0 <= float(c.get("cy", "nan")) <= 480 for c in circles)


@pytest.mark.parametrize("by", BY)
def test_html_of_a_cpu_trace_without_bounds(tmp_path, monkeypatch, by):
    monkeypatch.chdir(tmp_path)  # no golden folder
    out = tmp_path / "r.html"
    assert main([str(DATA / "cpu.json.gz"), "--by", by, "--html", str(out)]) == 0
    assert "no bounds" in out.read_text(encoding="utf-8")


def test_html_without_any_flops(tmp_path):
    r = Recording()
    r.kernel("argmax", 2.0)
    out = tmp_path / "r.html"
    assert main([str(r.save(tmp_path / "t.json")), "--html", str(out)]) == 0
    assert "No row has known FLOPs." in out.read_text(encoding="utf-8")


def test_png(saved, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.png"
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert main([str(saved), "--png", str(out)]) == 1
    assert "pip install 'w4a16[bench]'" in capsys.readouterr().err


def test_measured_peaks_replace_the_published(saved, capsys):
    assert main([str(saved), "--peaks", "700,3000"]) == 0
    assert "bounds of the given peaks: 700 TFLOP/s, 3000 GB/s" in capsys.readouterr().out
    assert main([str(saved), "--peaks", "fast"]) == 1
    assert "--peaks: got fast, wanted TFLOPS,GB/S" in capsys.readouterr().err


PEAKS = Peaks(
    machine="NVIDIA H100 80GB HBM3",
    session="a test",
    memory_bytes_per_s={"copy": 2.5e12, "read": 3e12},
    matrix_flops={"bf16": 7e14, "fp16": 6e14, "fp32": 5e13},
    launch_us=2.0,
    round_trip_us=9.0,
    graph_us=1.0,
)


def test_kept_peaks_are_the_bounds(saved, tmp_path, capsys):
    save(PEAKS, tmp_path / "golden" / "h100" / "device.json")
    assert main([str(saved), "--by", "shape", "--golden", str(tmp_path / "golden")]) == 0
    out = capsys.readouterr().out
    assert "bounds of NVIDIA H100 80GB HBM3 as measured (" in out
    assert "device.json): 700 TFLOP/s, 3000 GB/s" in out
    bound = 2 * 2048 * 6144 * 4096 / 7e14 * 1e6
    line = next(line for line in out.splitlines() if line.startswith("sm90_prefill"))
    assert line.split()[-3:] == [f"{bound:.0f}", f"{100 * bound / 150:.3g}", "compute"]
    assert "note: The trace is of" not in out
    assert main([str(saved), "--golden", str(tmp_path / "golden"), "--device", "sm90"]) == 0
    assert "bounds of H100 SXM: 989 TFLOP/s" in capsys.readouterr().out
    assert main([str(saved), "--golden", str(tmp_path)]) == 0
    assert "bounds of H100 SXM: 989 TFLOP/s" in capsys.readouterr().out


def test_each_dtype_has_its_measured_peak(tmp_path):
    save(PEAKS, tmp_path / "h100" / "device.json")
    device = measured(DEVICES["sm90"], "h100", tmp_path)
    product = {"batch": 1, "m": 8192, "n": 8192, "k": 8192}
    for act, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        gemm = Gemm(**product, element_bytes=size, act=act)
        assert gemm.cost().bound(device, act)[0] == pytest.approx(gemm.cost().flops / PEAKS.matrix_flops[act])
    assert gemm.cost().bound(DEVICES["sm90"], "fp32")[0] == pytest.approx(gemm.cost().flops / 989e12)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"machine": "x"}', json.dumps({**asdict(PEAKS), "memory_bytes_per_s": {"copy": 0, "read": 1}})]
)
def test_a_damaged_peaks_file_says_so(tmp_path, text):
    path = tmp_path / "device.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="w4a16 device --save"):
        load(path)


def test_the_bounds_as_a_sentence(saved):
    report = report_of(saved, phase="decode")
    known = sum(row.known_us for row in report.rows)
    bound = sum(row.bound_us for row in report.rows)
    assert f"{100 * bound / known:.1f} % of the {known * 1e-3:.3f} ms" in report.bound_sentence()
    assert report.bound_sentence() in as_table(report)
    trace = read(saved)
    assert make_report(trace, step_of(trace), None).bound_sentence() == ""


def test_a_named_device(saved, capsys):
    assert main([str(saved), "--device", "gfx1151"]) == 0
    out = capsys.readouterr().out
    assert "bounds of Radeon 8060S (Strix Halo)" in out
    assert "The trace is of NVIDIA H100 80GB HBM3, the bounds of Radeon 8060S (Strix Halo)" in out
    assert main([str(saved), "--device", "tpu"]) == 1
    assert "wanted cpu, gfx1100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "rocm", "arch"),
    [
        (H100, False, "sm90"),
        ({"computeMajor": 11, "computeMinor": 5, "numSms": 20}, True, "gfx1151"),
        ({"computeMajor": 11, "computeMinor": 0, "numSms": 48}, True, "gfx1100"),
        ({"computeMajor": 11, "computeMinor": 0, "numSms": 60}, True, "gfx1101"),
        ({"computeMajor": 9, "computeMinor": 4, "numSms": 304}, True, "gfx942"),
        ({"computeMajor": 11, "computeMinor": 0, "numSms": 7}, True, None),
        ({"computeMajor": 99, "computeMinor": 0}, False, None),
    ],
)
def test_the_device_of_a_trace(saved, facts, rocm, arch):
    trace: Trace = read(saved)
    trace.devices, trace.on_rocm = [facts], rocm
    found = device_of(trace)
    assert (found and found.arch) == arch


def test_errors_end_the_command(tmp_path, capsys):
    assert main([str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("BadInput: ")
