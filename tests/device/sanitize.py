"""NVIDIA's checker over every Hopper kernel (sanitize_cases.py), as many processes side by side as are asked for:

    python tests/device/sanitize.py [--processes 14] [--tools memcheck,racecheck,synccheck] [--stems sm90_moe]

Ends with status 1 unless every launch agrees with the reference and no tool finds an error. What racecheck reports of
the bytes by which Triton hands over partitions, and of words that two mbarriers order, is counted apart, where the
machine code shows it to be ordered (tests/cpu/racecheck.py); the kernels `partitions` and `words`, which have nothing
else in shared memory, show such reports too.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
from racecheck import disassembled, hazards, unexplained

TOOLS = ("memcheck", "racecheck", "synccheck")
PLAIN = "plain"  # no tool, and first: Triton compiles slowly under one
CASES = Path(__file__).with_name("sanitize_cases.py")


def run(tool: str, processes: int, stems: str, folder: Path) -> list[str]:
    """What each process printed under a tool, or PLAIN; its machine code is left in folder/<number>."""
    started = []
    for number in range(processes):
        code = folder / str(number)
        code.mkdir(parents=True)
        output = (folder / f"{number}.txt").open("w")
        part = [sys.executable, str(CASES), f"{number}/{processes}", str(code), stems]
        under = [] if tool == PLAIN else ["compute-sanitizer", "--tool", tool]
        started.append(subprocess.Popen([*under, *part], stdout=output, stderr=subprocess.STDOUT))
    for process in started:
        process.wait()
    return [(folder / f"{number}.txt").read_text() for number in range(processes)]


def judged(tool: str, outputs: list[str], folder: Path) -> tuple[list[str], str]:
    """Findings, and one line on the rest."""
    launches, found, handed = 0, [], Counter[str]()
    for number, output in enumerate(outputs):
        agree = [line.split()[0] for line in output.splitlines() if line.endswith("launches agree with the reference")]
        launches += sum(map(int, agree))
        if len(agree) != 1:
            found.append(f"{tool}, part {number} ended early:\n{output[-3000:]}")
        elif tool == "racecheck":
            codes: dict[str, list[str]] = {}
            for cubin in sorted((folder / str(number)).glob("*.cubin")):
                codes.setdefault(cubin.name.split(".")[0], []).append(disassembled(cubin))
            reports = hazards(output)
            rest = unexplained(reports, codes)
            found += [f"{tool}, part {number}:\n{report.text}" for report in rest]
            handed.update(report.kernel for report in reports if report not in rest)
        elif tool != PLAIN and "ERROR SUMMARY: 0 errors" not in output:
            found.append(f"{tool}, part {number}:\n{output}")
    line = f"{tool}: {launches} launches, {len(found)} findings"
    if handed:
        each = ", ".join(f"{count} in {kernel}" for kernel, count in sorted(handed.items()))
        line += f"; apart from these, reports on partitions and words, ordered in machine code: {each}"
    return found, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--stems", default="", help="kernels, comma-separated; control: `partitions` and `words`")
    parser.add_argument("--keep", type=Path, help="a folder for what the tools printed")
    given = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("got no compute-sanitizer, wanted it on the PATH. It comes with NVIDIA's CUDA toolkit.")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for tool in (PLAIN, *given.tools.split(",")):
            begun = time.monotonic()
            folder = Path(temporary, tool)
            outputs = run(tool, given.processes, given.stems, folder)
            if given.keep is not None:
                shutil.copytree(folder, given.keep / tool, ignore=shutil.ignore_patterns("*.cubin"), dirs_exist_ok=True)
            found, line = judged(tool, outputs, folder)
            failed |= bool(found)
            print("\n".join([*found, f"{line} ({time.monotonic() - begun:.0f} s)"]), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
