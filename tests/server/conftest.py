"""A gateway inside the test's process, in front of workers that have vLLM's interface and no model."""

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
from trimtab_server.controls.registry import Catalogue, load_controls
from trimtab_server.engines.local import LocalWorker
from trimtab_server.engines.pool import Workers
from trimtab_server.engines.replica import State, Worker
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


class FakeWorkers(Workers):
    """Workers whose servers, but for those elsewhere, are in this process; `seen` is what each was asked."""

    def __init__(self, settings, metrics):
        super().__init__(settings, metrics)
        self.seen: dict[tuple[str, int], dict] = {}
        self.apps: dict[tuple[str, int], web.Application] = {}
        self._all_ready = asyncio.Event()

    async def __aenter__(self):
        await super().__aenter__()
        await self._all_ready.wait()
        return self

    async def _run(self, worker: Worker) -> None:
        if not isinstance(worker, LocalWorker):
            await super()._run(worker)
            return
        worker._directory.mkdir()
        controls = self._settings.controls_of(worker.id.model)
        app = make_app(worker.id.model, controls, admin_key=worker._admin_key)
        self.seen[worker.id.model, worker.id.index] = app[SEEN]
        self.apps[worker.id.model, worker.id.index] = app
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.UnixSite(runner, str(worker._socket)).start()
        await worker.upstream.open()
        await worker._become_ready()
        if all(other.state is State.READY for other in self.all if isinstance(other, LocalWorker)):
            self._all_ready.set()
        try:
            await asyncio.Event().wait()
        finally:
            await worker.upstream.close()
            await runner.cleanup()
            worker._output.close()


class Gateway:
    """A client of a gateway in this process, and what is behind it."""

    def __init__(
        self, client: TestClient, workers: FakeWorkers, metrics: Metrics, settings: Settings
    ) -> None:
        self.client = client
        self.settings = settings
        self.workers = workers
        self.metrics = metrics

    def chat(self, *, path: str = "/v1/chat/completions", **body):
        return self.client.post(path, json={"messages": [{"role": "user", "content": "hi there"}], **body})

    def post(self, body: str | bytes, path: str = "/v1/chat/completions", **headers):
        return self.client.post(path, content=body, headers={"content-type": "application/json", **headers})

    def worker(self, model: str, replica: int = 0) -> Worker:
        return self.workers[model].workers[replica]

    def cut_off(self, model: str, replica: int = 0) -> None:
        """From now on the worker takes no connection."""
        self.worker(model, replica)._socket.unlink()

    @staticmethod
    def error(response) -> dict:
        """The error object of an answer, which has all its four fields."""
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def asked(self, model: str, replica: int = 0) -> list[dict]:
        """The generating requests that reached the worker."""
        return self.workers.seen[model, replica]["requests"]

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
        workers = FakeWorkers(settings, metrics)
        app = create_app(settings, Catalogue(settings, load_controls(settings)), workers, metrics)
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        running.append(client)
        return Gateway(client, workers, metrics, settings)

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
