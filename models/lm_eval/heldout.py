"""The text of the task w4a16_heldout, one document a module of heldout.txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SEPARATOR = "<|endoftext|>"


def load(**_: Any) -> dict[str, Any]:
    import datasets

    text = Path(__file__).parents[1].joinpath("heldout.txt").read_text(encoding="utf-8")
    pages = [page for page in text.split(SEPARATOR) if page.strip()]
    return {"test": datasets.Dataset.from_list([{"page": page} for page in pages])}
