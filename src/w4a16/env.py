"""Every environment variable of w4a16, each read once, at import."""

from __future__ import annotations

import os

# Force one row of the dispatch table by its stem; a forced kernel that cannot run raises.
FORCED_KERNEL: str | None = os.environ.get("W4A16_KERNEL") or None

# Dequantised copies that a load makes for prefill: off, soft or hard; and the share of the memory they may fill.
DENSE_CACHE: str = os.environ.get("W4A16_DENSE_CACHE", "off")
MEMORY_UTILIZATION: str = os.environ.get("W4A16_MEMORY_UTILIZATION", "0.9")

# Open a named range around every call, for profilers.
PROFILE: bool = os.environ.get("W4A16_PROFILE", "0") not in ("", "0")

# 0 leaves vLLM's own kernels in place where w4a16 is installed beside it.
VLLM: bool = os.environ.get("W4A16_VLLM", "1") != "0"


def with_plugin(on: bool) -> dict[str, str]:
    """This process's environment for a child, with the vLLM plugin on or off."""
    return {**os.environ, "W4A16_VLLM": "1" if on else "0"}
