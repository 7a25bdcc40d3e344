"""`python -m w4a16.bench`: `w4a16 bench` for a machine without the `cli` extra; the same options."""

from __future__ import annotations

import sys

from .command import main

sys.exit(main())
