"""`import w4a16` is light: no compiler, no driver, no optional package."""

from __future__ import annotations

import subprocess
import sys


def test_import_pulls_in_no_heavy_package() -> None:
    code = "import sys, w4a16; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert loaded.isdisjoint({"triton", "numba", "transformers", "rich", "typer", "compressed_tensors"})
    assert not {name for name in loaded if name.startswith("w4a16.kernels.")}
