"""Reading Chrome traces: layouts of the JSON, damage, and size."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from traces import H100, Recording

from w4a16.errors import BadInput
from w4a16.roofline import chrome
from w4a16.roofline.chrome import ChromeTrace
from w4a16.roofline.trace import read

EVENTS = [
    {"ph": "X", "name": f'op {i} \\ " \u00e9', "ts": i + 0.125, "args": {"dims": [[i, 2], []]}} for i in range(50)
]


def events_of(path: Path, text: str) -> list[object]:
    path.write_text(text, encoding="utf-8")
    return list(ChromeTrace(path).events())


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_any_layout_and_any_chunk(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(chrome, "CHUNK", chunk)
    path = tmp_path / "t.json"
    top = {"a": 1, "b": {"c": []}, "traceEvents": EVENTS, "last": 12.5}
    path.write_text(json.dumps(top, indent=indent, ensure_ascii=False), encoding="utf-8")
    trace = ChromeTrace(path)
    assert list(trace.events()) == EVENTS
    assert trace.header == {"a": 1, "b": {"c": []}, "last": 12.5}


def test_a_bare_array_and_gzip_whatever_the_name(tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(gzip.compress(json.dumps(EVENTS).encode()))
    assert list(ChromeTrace(path).events()) == EVENTS


def test_a_truncated_file_says_where(tmp_path, monkeypatch):
    text = json.dumps({"traceEvents": EVENTS})
    for chunk in (16, 1 << 20):
        monkeypatch.setattr(chrome, "CHUNK", chunk)
        for length in range(1, len(text), 97):
            with pytest.raises(BadInput, match=r"got the end of the file after \d+ whole events, wanted the closing"):
                events_of(tmp_path / "t.json", text[:length])


def test_a_truncated_gzip_says_so(tmp_path):
    path = tmp_path / "t.json.gz"
    whole = gzip.compress(json.dumps({"traceEvents": EVENTS * 50}).encode())
    for length in range(30, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="the end of the gzip data"):
            list(ChromeTrace(path).events())


def test_damaged_gzip_says_so(tmp_path):
    path = tmp_path / "t.json.gz"
    whole = bytearray(gzip.compress(json.dumps({"traceEvents": EVENTS * 50}).encode()))
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(whole))
    with pytest.raises(BadInput, match="damaged"):
        list(ChromeTrace(path).events())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file, wanted a Chrome trace"),
        ("hello", "got a file that starts with 'hello'"),
        ("{}", "got JSON with the keys none, wanted traceEvents"),
        ('{"a": 1}', "got JSON with the keys a, wanted traceEvents"),
        ('{"traceEvents": 3}', "got JSON with the keys traceEvents, wanted traceEvents"),
        ('{"traceEvents": [{"a": 1} {"a": 2}]}', "after 1 whole events, wanted JSON \\(a comma or \\]\\)"),
        ('{"traceEvents": [{"a": 1}, {"a": nan, "b": "' + "x" * 99 + '"}]}', "at character 33, after 1 whole events"),
        ('{"traceEvents": [{"a": 1}, 7]}', "got 7 as event 2, wanted an object"),
        ('{"traceEvents": [{"a": ]]]' + " " * 99 + "}", "wanted JSON"),
        ("{[1]: 2}", "a name in quotes"),
        ("[" * 100_000, "damaged data|as event"),
    ],
)
def test_malformed_files_say_where(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        events_of(tmp_path / "t.json", text)


def test_a_missing_file_and_wrong_bytes(tmp_path):
    with pytest.raises(BadInput, match=r"No such file.*Correct the path"):
        list(ChromeTrace(tmp_path / "none.json").events())
    (tmp_path / "t.json").write_bytes(b'{"traceEvents": [{"name": "\xff\xfe"}]}')
    with pytest.raises(BadInput, match="wanted UTF-8 JSON"):
        list(ChromeTrace(tmp_path / "t.json").events())


@pytest.mark.parametrize(
    "event",
    [
        {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "dur": 1},
        {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": "soon", "dur": 1},
        {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": -1},
        {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": float("nan"), "dur": 1},
        {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": 1, "args": [1]},
        {"ph": "X", "cat": 3, "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": 1},
    ],
)
def test_events_without_times_are_refused(tmp_path, event):
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [event]}))
    with pytest.raises(BadInput, match=r"wanted an event with finite ts and dur"):
        read(tmp_path / "t.json")


def test_a_trace_without_work_is_refused(tmp_path):
    (tmp_path / "t.json").write_text('{"traceEvents": [{"ph": "M", "name": "process_name"}]}')
    with pytest.raises(BadInput, match="got no kernel and no operator"):
        read(tmp_path / "t.json")


MEMORY = """
import resource, sys
from pathlib import Path
from w4a16.roofline.step import step_of
from w4a16.roofline.trace import read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step = step_of(read(Path(sys.argv[1])))
print(len(step.calls), step.usage.busy, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_stays_below_twice_the_file(tmp_path):
    """What 1 GB in 2 GB of memory asks for; with stacks, most of a real trace is events that are not kept."""
    recording = Recording()
    recording.scope("triton_decode 1x4096x4096 g=128 asym", ("_triton_decode", 6.5))
    one = [json.dumps(event) for event in recording.events]
    stack = json.dumps({"ph": "X", "cat": "python_function", "name": "model.py(12): forward" + "x" * 200, "ts": 1})
    path, calls = tmp_path / "big.json", 0
    with path.open("w") as file:
        file.write(f'{{"deviceProperties": [{json.dumps(H100)}], "traceEvents": [{stack}')
        while file.tell() < 40e6:
            calls += 1
            for event in one:
                moved = event.replace('"ts": 1', f'"ts": {calls}1').replace('lation": 1', f'lation": {calls}')
                file.write(f",\n{moved},\n{stack}")
        file.write("]}")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    found, busy, grown = map(float, done.stdout.split())
    assert found == calls
    assert busy == pytest.approx(6.5 * calls)
    assert grown < 2 * path.stat().st_size
