"""One gateway with three real engines for each module here; they end before the next one starts others."""

from __future__ import annotations

import os

import pytest

from serving import ENGINE, engine_environment, gateway

# the control of b runs beside its target, those of the others before theirs
PLUGINS: dict[str, dict] = {"a": {}, "b": {"control_cpus": [min(os.sched_getaffinity(0))]}, "c": {}}


@pytest.fixture(scope="module")
def server(family, tmp_path_factory):
    """The family's three targets, each in a real vLLM engine, and its control; the base URL."""
    directory = tmp_path_factory.mktemp("server")
    config = {
        "controls": {"control": str(family.control)},
        "tables": str(directory / "tables"),
        "models": {
            name: {
                "model": str(path),
                "args": ENGINE,
                "env": engine_environment(i % 2),
                "plugin": PLUGINS[name],
            }
            for i, (name, path) in enumerate(family.targets.items())
        },
    }
    with gateway(directory, config) as url:
        yield url
