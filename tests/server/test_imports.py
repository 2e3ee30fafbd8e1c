"""The direction of imports within the server: cli -> api -> controls -> engines -> config."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trimtab_server

ROOT = Path(trimtab_server.__file__).parent
BELOW = {
    "cli": {"api", "controls", "engines", "config"},
    "api": {"controls", "engines", "config"},
    "controls": {"engines", "config"},
    "engines": {"config"},
    "config": set(),
    "errors": set(),
    "metrics": set(),
    "protocol": set(),
    "logs": set(),
    "facts": set(),
}
"""The layers that each layer may import, beside itself and `EVERYWHERE`."""
EVERYWHERE = {"errors", "metrics", "protocol", "logs", "facts"}
FACTS = {"engines.vllm.endpoints", "engines.vllm.flags"}
"""Declarations about vLLM, which the configuration is checked against. They import nothing of the server."""
COMMAND = {"cli", "server", "__main__", ""}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The server's modules that a file imports, at its top and inside its functions."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {module for node in nodes for module in _modules(node)}


def _modules(node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        package, _, module = name.partition(".")
        if package == ROOT.name:
            yield module if module in MODULES else module.rpartition(".")[0]


def layer(module: str) -> str:
    if module in FACTS:
        return "facts"
    return "cli" if module in COMMAND else module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_its_own_layer_and_those_below(module):
    own = layer(module)
    allowed = BELOW[own] | EVERYWHERE | ({own} if own != "facts" else set())
    assert {other for other in imported(MODULES[module]) if layer(other) not in allowed} == set()


def test_declarations_about_vllm_import_nothing_of_the_server():
    assert {other for module in FACTS for other in imported(MODULES[module])} == set()


def test_imports_have_no_cycle():
    graph = {module: imported(path) - {module} for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_has_at_most_300_lines(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 300
