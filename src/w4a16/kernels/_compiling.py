"""What a compiler throws becomes one KernelFailed: which kernel, why, and what to do. A later call tries again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import KernelFailed, W4A16Error


@contextmanager
def compiling(kernel: str, cache: str) -> Iterator[None]:
    """Around the compilation of `kernel`; `cache` is the variable that moves its compiler's cache."""
    try:
        yield
    except (W4A16Error, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        unwritable = isinstance(error, OSError) or "cannot cache function" in why
        then = (
            f"Set {cache} to a folder that can be written, before the process starts."
            if unwritable
            else "Please report it; W4A16_KERNEL=dense serves linear layers without it."
        )
        what = "its compiler's cache cannot be written" if unwritable else "it did not compile"
        raise KernelFailed(f"{kernel}: {what} ({type(error).__name__}: {why}). {then}") from error
