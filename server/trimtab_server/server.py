"""Running the gateway: the application on its port, from the first signal to the last process."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from pathlib import Path
from types import FrameType

import uvicorn

from trimtab_server.api.app import create_app
from trimtab_server.config.schema import Settings
from trimtab_server.config.tls import uvicorn_options
from trimtab_server.config.types import ADMIN_KEYS_VARIABLE, SettingsError
from trimtab_server.controls.registry import ControlRegistry, load_controls
from trimtab_server.engines.pool import ModelPool
from trimtab_server.engines.vllm.command import PRIVATE_VLLM_KEY
from trimtab_server.logs import set_up_logging
from trimtab_server.metrics import Metrics

logger = logging.getLogger(__name__)


class GatewayServer(uvicorn.Server):
    """A server that ends with a status of its own, not by the signal, and never without its shutdown."""

    status = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the base's signature
        """The first signal lets requests finish, the second does not."""
        self.force_exit = self.should_exit
        self.should_exit = True

    def give_up(self) -> None:
        """End with status 1: there is nothing left to serve."""
        logger.error("all models have failed, the gateway stops")
        self.status = 1
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()


def run_gateway(settings: Settings, *, verbose: bool = False) -> int:
    """Serve until a signal. Returns the exit status.

    Raises:
        SettingsError: a control's pack or a file of TLS can't be read, or no log be written; nothing has been
            started.
    """
    set_up_logging(settings.log_level, settings.log_format)
    _warn_of_open_doors(settings)
    registry = ControlRegistry(settings, load_controls(settings))
    metrics = Metrics()
    replicas = ModelPool(settings, metrics, echo=verbose)
    config = uvicorn.Config(
        create_app(settings, registry, replicas, metrics),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.timeouts.keep_alive,
        timeout_graceful_shutdown=round(settings.timeouts.drain),
        **uvicorn_options(settings.tls),
    )
    _make_directory(settings.logs)
    listener = config.bind_socket()
    listener.set_inheritable(False)  # else a replica's launcher would keep the port after a hard end
    server = GatewayServer(config)
    replicas.on_all_failed = server.give_up
    server.run(sockets=[listener])
    return server.status


def _make_directory(logs: Path) -> None:
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"logs: the directory can't be made: {error}") from error


def _warn_of_open_doors(settings: Settings) -> None:
    if not settings.api_keys and not _is_loopback(settings.host):
        logger.warning(
            "listening on %s without API keys: everyone who can reach this port can use it", settings.host
        )
    if settings.control_roots and not settings.admin_keys:
        logger.warning(
            "control_roots has no effect without admin keys. Set admin_keys_file or %s",
            ADMIN_KEYS_VARIABLE,
        )
    if PRIVATE_VLLM_KEY in os.environ:
        logger.warning("%s has no effect here: the gateway's keys are in TRIMTAB_API_KEYS", PRIVATE_VLLM_KEY)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
