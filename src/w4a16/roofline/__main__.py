"""`python -m w4a16.roofline`: `w4a16 roofline` for a machine without the `cli` extra; the same options."""

from __future__ import annotations

import sys

from .command import main

sys.exit(main())
