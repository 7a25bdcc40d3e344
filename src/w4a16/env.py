"""Every environment variable of w4a16, each read once, at import."""

from __future__ import annotations

import os

# Force one row of the dispatch table by its stem; a forced kernel that cannot run raises.
FORCED_KERNEL: str | None = os.environ.get("W4A16_KERNEL") or None

# Open a named range around every call, for profilers.
PROFILE: bool = os.environ.get("W4A16_PROFILE", "0") not in ("", "0")
