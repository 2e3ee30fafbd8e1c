"""A gateway inside the test's process, in front of replicas that have vLLM's interface and no model."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from fastapi.testclient import TestClient

import tiny
from fake_vllm import SEEN, make_app
from served import served
from trimtab_processors.pack import Pack
from trimtab_server.api.app import create_app
from trimtab_server.config.schema import Settings, load_settings
from trimtab_server.controls.registry import ControlRegistry, load_controls
from trimtab_server.engines.local import LocalReplica
from trimtab_server.engines.pool import ModelPool
from trimtab_server.engines.replica import Replica, State
from trimtab_server.metrics import Metrics


@pytest.fixture(scope="session")
def pack(tmp_path_factory) -> Path:
    """A pack of which the gateway needs no more than the tokenizer."""
    directory = tmp_path_factory.mktemp("pack")
    tokenizer = tiny.byte_level(300)
    tokenizer.chat_template = tiny.CONTROL_TEMPLATE
    tokenizer.save_pretrained(directory)
    Pack(name="inside", strength=0.5, description="keeps secrets", training={"template": "a"}).save(directory)
    return directory


@pytest.fixture(scope="session")
def bare_pack(tmp_path_factory) -> Path:
    """A pack without a chat template, and without a manifest."""
    directory = tmp_path_factory.mktemp("bare")
    tokenizer = tiny.byte_level(300)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def write_config(tmp_path):
    """Write a configuration; returns its path."""

    def write(config: dict) -> Path:
        path = tmp_path / "trimtab.yaml"
        (tmp_path / "logs").mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"logs": "logs", "tables": "tables", **config}))
        return path

    return write


@pytest.fixture
def serve(tmp_path):
    """Start a gateway as a process of the test's own, with one model `m`."""
    with contextlib.ExitStack() as stack:
        yield lambda **config: stack.enter_context(served(tmp_path, **config))


class FakePool(ModelPool):
    """A pool whose local servers are in this process; `seen` is what each was asked."""

    def __init__(self, settings, metrics):
        super().__init__(settings, metrics)
        self.seen: dict[tuple[str, int], dict] = {}
        self.apps: dict[tuple[str, int], web.Application] = {}
        self._all_ready = asyncio.Event()

    async def __aenter__(self):
        await super().__aenter__()
        await self._all_ready.wait()
        return self

    async def _run(self, replica: Replica) -> None:
        if not isinstance(replica, LocalReplica):
            await super()._run(replica)
            return
        replica._directory.mkdir()
        controls = self._settings.controls_of(replica.id.model)
        app = make_app(replica.id.model, controls, admin_key=replica._admin_key)
        self.seen[replica.id.model, replica.id.index] = app[SEEN]
        self.apps[replica.id.model, replica.id.index] = app
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.UnixSite(runner, str(replica._socket)).start()
        await replica.upstream.open()
        await replica._become_ready()
        if all(other.state is State.READY for other in self.all if isinstance(other, LocalReplica)):
            self._all_ready.set()
        try:
            await asyncio.Event().wait()
        finally:
            await replica.upstream.close()
            await runner.cleanup()
            replica._output.close()


class Gateway:
    """A client of a gateway in this process, and what is behind it."""

    def __init__(self, client: TestClient, replicas: FakePool, metrics: Metrics, settings: Settings) -> None:
        self.client = client
        self.settings = settings
        self.replicas = replicas
        self.metrics = metrics

    def chat(self, *, path: str = "/v1/chat/completions", **body):
        return self.client.post(path, json={"messages": [{"role": "user", "content": "hi there"}], **body})

    def post(self, body: str | bytes, path: str = "/v1/chat/completions", **headers):
        return self.client.post(path, content=body, headers={"content-type": "application/json", **headers})

    def replica(self, model: str, replica: int = 0) -> Replica:
        return self.replicas[model].replicas[replica]

    def cut_off(self, model: str, replica: int = 0) -> None:
        """From now on the replica takes no connection."""
        self.replica(model, replica)._socket.unlink()

    @staticmethod
    def error(response) -> dict:
        """The error object of an answer, which has all its four fields."""
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def asked(self, model: str, replica: int = 0) -> list[dict]:
        """The generating requests that reached the replica."""
        return self.replicas.seen[model, replica]["requests"]

    def last(self, model: str) -> dict:
        """The body of the last one."""
        return self.asked(model)[-1]["body"]


@pytest.fixture
def start(write_config):
    """Start a gateway with this configuration, by default with one model `m` and no control."""
    running = []

    def start(**config) -> Gateway:
        config.setdefault("models", {"m": {"model": "."}})
        settings = load_settings(write_config(config))
        metrics = Metrics()
        replicas = FakePool(settings, metrics)
        app = create_app(settings, ControlRegistry(settings, load_controls(settings)), replicas, metrics)
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        running.append(client)
        return Gateway(client, replicas, metrics, settings)

    yield start
    for client in running:
        client.__exit__(None, None, None)


@pytest.fixture
def two_models(start, pack) -> Gateway:
    """`plain` offers `one` and `two`, `steered` has a default control and offers only that."""
    return start(
        controls={"one": str(pack), "two": str(pack)},
        models={
            "plain": {"model": "."},
            "steered": {"model": ".", "default_control": "one", "controls": ["one"]},
        },
    )
