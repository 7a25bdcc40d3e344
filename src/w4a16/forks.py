"""Forked children: once a parent has computed on OpenMP threads, GNU's runtime hangs in its children, torch with it.

So they compute on one thread, as torch's own DataLoader workers do. A child may ask for more (torch.set_num_threads)
where its parent has only imported.
"""

from __future__ import annotations

import functools
import os

import torch


@functools.cache
def one_thread_in_children() -> None:
    """From here on; called when the first kernel is about to run."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
