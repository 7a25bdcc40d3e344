"""Every name of vLLM that the plugin relies on is in the vLLM installed here, and in the files of the newest one."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import w4a16.plugins._vllm_names as names

# `make test-vllm` unpacks the files of the newest vLLM here; its wheel needs CUDA, so it is read and not imported
NEWEST = Path(os.environ.get("VLLM_NEWEST", Path(__file__).parents[2] / ".vllm" / "newest"))


def test_installed() -> None:
    assert names.missing() == []


def module_file(module: str) -> Path:
    path = NEWEST.joinpath(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def definitions(body: list[ast.stmt]) -> dict[str, ast.AST]:
    """What a module or class defines or imports, by name; also under `if`, `try` and `with`."""
    found: dict[str, ast.AST] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            found |= definitions([*node.body, *getattr(node, "orelse", ())])
    return found


@pytest.mark.skipif(not (NEWEST / "vllm").is_dir(), reason="the newest vLLM is not unpacked: make test-vllm does so")
@pytest.mark.parametrize(("module", "entry"), [(m, e) for m, entries in names.NAMES.items() for e in entries])
def test_newest(module: str, entry: str) -> None:
    path, arguments = names.parse(entry)
    node: ast.AST = ast.parse(module_file(module).read_text())
    for part in path:
        assert isinstance(node, ast.Module | ast.ClassDef), f"{module}: {part} is looked for in no class"
        held = definitions(node.body)
        assert part in held, f"{module} has no {'.'.join(path)}"
        node = held[part]
    if arguments:
        assert isinstance(node, ast.FunctionDef)
        has = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        assert set(arguments) <= set(has), f"{module}.{entry}: it takes {has}"
