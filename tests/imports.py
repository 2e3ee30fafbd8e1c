"""What a module imports, read from its source: at its top and inside its functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import trimtab_training

TRAINING = Path(trimtab_training.__file__).parent


def training_imports(source: Path) -> set[str]:
    """The modules of `trimtab_training` that a file imports, named from there: `control.trainer`."""
    named = {
        name for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) for name in _names(node)
    }
    modules = {
        name.removeprefix("trimtab_training.") for name in named if name.startswith("trimtab_training.")
    }
    return {module if _is_module(module) else module.rpartition(".")[0] for module in modules}


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_module(name: str) -> bool:
    path = TRAINING.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()
