"""The access to each endpoint, and the table's agreement with vLLM."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_routes
from trimtab_server.engines.vllm import endpoints
from trimtab_server.engines.vllm.endpoints import (
    CONTROLS,
    ENDPOINTS,
    LOAD,
    READY,
    UNLOAD,
    Access,
    access_to,
    methods_at,
    paths_with,
)

TRIMTAB = {READY, CONTROLS, LOAD, UNLOAD}
"""The endpoints of the table that vLLM does not have."""
WEBSOCKETS = paths_with(Access.WEBSOCKET)


METHODS = {"get", "post", "put", "patch", "delete", "head", "options", "websocket", "api_route"}
ADDERS = {"add_api_route", "add_route", "add_api_websocket_route", "add_websocket_route", "mount"}
OTHER_PROGRAMS = {"launchers/dp_supervisor.py", "cli/preload.py"}
"""Modules with servers of their own, which no request through a replica's socket reaches."""
NOT_LITERAL = {
    "app.swagger_ui_oauth2_redirect_url": "/docs/oauth2-redirect",
    "route.path": None,  # routes that the same module has declared before
}


def declared(source: str) -> set[tuple[str, str]]:
    """The paths that a module's decorators and calls declare, each with the name of its method."""
    tree = ast.parse(source)
    decorators = [
        decorator
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr in METHODS
    ]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ADDERS
    ]
    found = set()
    for call in decorators + calls:
        path = call.args[0]
        literal = path.value if isinstance(path, ast.Constant) else NOT_LITERAL[ast.unparse(path)]
        if literal is not None:
            found.add((literal, call.func.attr))
    return found


@pytest.fixture(scope="module")
def in_the_source() -> set[tuple[str, str]]:
    """Every path in vLLM's source, whatever flag opens it."""
    (package,) = importlib.util.find_spec("vllm").submodule_search_locations
    root = Path(package) / "entrypoints"
    modules = [path for path in root.rglob("*.py") if path.relative_to(root).as_posix() not in OTHER_PROGRAMS]
    return set().union(*(declared(path.read_text(encoding="utf-8")) for path in modules))


def test_every_endpoint_in_vllms_source_is_allowed_for_admins_or_disabled(in_the_source):
    assert len(in_the_source) > 60
    unknown = {path for path, _ in in_the_source if path not in ENDPOINTS.keys() - TRIMTAB}
    assert unknown == set()


@pytest.mark.engine
def test_every_route_of_vllms_server_is_allowed_for_admins_or_disabled():
    """The table that its server has at run time, which libraries add to."""
    done = subprocess.run(
        [sys.executable, vllm_routes.__file__], check=True, capture_output=True, text=True, timeout=600
    )
    table = [tuple(route) for route in json.loads(done.stdout.splitlines()[-1])]
    assert len(table) > 60
    known = ENDPOINTS.keys() - WEBSOCKETS - TRIMTAB
    assert {path for path, method in table if method != "WEBSOCKET"} - known == set()
    assert {path for path, method in table if method == "WEBSOCKET"} <= WEBSOCKETS | {"/static", "/metrics"}
    clients = paths_with(Access.CLIENT)
    wrong = {
        path for path, method in table if path in clients and method not in ENDPOINTS[path].methods | {"HEAD"}
    }
    assert wrong == set()


def test_a_path_is_in_one_row():
    """The rows are a display of a dict, in which the last of two equal paths would win in silence."""
    tree = ast.parse(Path(endpoints.__file__).read_text(encoding="utf-8"))
    (table,) = [node for node in ast.walk(tree) if isinstance(node, ast.DictComp)]
    written = [node.value for node in ast.walk(table) if isinstance(node, ast.Constant)]
    paths = [value for value in written if isinstance(value, str) and value.startswith("/")]
    assert len(paths) > 60
    assert len(paths) == len(set(paths))
    named = [node.id for node in ast.walk(table) if isinstance(node, ast.Name) and node.id.isupper()]
    assert len(named) == len(set(named))


def test_the_table_has_nothing_that_vllm_has_not(in_the_source):
    """Except what libraries, the framework and Trimtab add."""
    added = {"/adapters", "/adapters/{adapter_name}", "/metrics", "/openapi.json", "/redoc"}
    assert ENDPOINTS.keys() - {path for path, _ in in_the_source} == added | TRIMTAB


@pytest.mark.parametrize(
    ("path", "access"),
    [
        ("/tokenize", Access.CLIENT),
        ("/v1/responses/resp_1", Access.CLIENT),
        ("/v1/responses/resp_1/cancel", Access.CLIENT),
        ("/v1/responses/a/b", Access.UNKNOWN),
        ("/v1/responses/..", Access.UNKNOWN),
        ("/v1/responses/../cancel", Access.UNKNOWN),
        ("/v1/responses/.hidden..", Access.CLIENT),
        ("/tokenize/", Access.UNKNOWN),
        ("//tokenize", Access.UNKNOWN),
        ("/Tokenize", Access.UNKNOWN),
        ("/tokenize\n", Access.UNKNOWN),
        ("/sleep", Access.ADMIN),
        ("/sleep/", Access.UNKNOWN),
        ("/invocations", Access.DISABLED),
        ("//Invocations/", Access.DISABLED),
        ("/made/up", Access.UNKNOWN),
    ],
)
def test_a_path_is_compared_as_a_whole(path, access):
    assert access_to(path) is access


def test_the_configuration_opens_a_path_but_none_that_is_disabled():
    opened = ("/sleep", "/mine/{name}", "/invocations")
    assert access_to("/sleep", opened) is Access.CLIENT
    assert access_to("/mine/x", opened) is Access.CLIENT
    assert access_to("/mine/x/y", opened) is Access.UNKNOWN
    assert access_to("/invocations", opened) is Access.DISABLED
    assert methods_at("/sleep") == set()
