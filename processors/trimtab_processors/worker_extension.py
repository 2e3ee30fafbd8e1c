"""Controls that come and go while an engine runs: what its worker processes do.

vLLM mixes `ControlWorker` into its worker class (`--worker-extension-cls`); the front end calls its methods
by `collective_rpc`, which reaches every rank between the same two steps. Only what takes no time happens
there: a control is loaded in a thread beside the engine's.
"""

from __future__ import annotations

import logging
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trimtab_processors.control import Control

logger = logging.getLogger(__name__)

_INSTANCE = secrets.token_hex(8)


class Runtime(Protocol):
    """What both runtimes have in common."""

    @property
    def controls(self) -> Sequence[Control]: ...

    def load(self, name: str, location: str) -> Any: ...

    def install(self, control: Any) -> None: ...

    def unload(self, name: str) -> None: ...


class _Desk:
    """The runtime of this process, and what is being loaded for it."""

    def __init__(self, runtime: Runtime, settle: Callable[[], None], device: torch.device) -> None:
        self.runtime = runtime
        self.settle = settle
        self._device = device
        self.loading: dict[str, Future[Any]] = {}
        self._loader = ThreadPoolExecutor(1, "trimtab-loader")

    def begin(self, name: str, location: str) -> None:
        self.loading[name] = self._loader.submit(self._load, name, location)

    def _load(self, name: str, location: str) -> Any:
        torch.set_num_threads(1)  # of this thread: the engine's cores are the engine's
        loaded = self.runtime.load(name, location)
        self.synchronize()
        return loaded

    def synchronize(self) -> None:
        """Wait for the device: this thread's work is on another stream than the engine's."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


_desk: _Desk | None = None


def attach(runtime: Runtime, settle: Callable[[], None], device: torch.device) -> None:
    """Let this process's worker load controls into `runtime`.

    Args:
        runtime: that of the engine's control processor.
        settle: waits until nothing of a step runs beside the engine's own thread.
        device: where it computes.
    """
    global _desk  # noqa: PLW0603 - vLLM makes both, and gives neither to the other
    _desk = _Desk(runtime, settle, device)


class ControlWorker:
    """Methods of vLLM's worker, on each rank."""

    def trimtab_begin_loading(self, name: str, location: str) -> None:
        """Begin to load the pack at `location` beside the engine's steps."""
        _here().begin(name, location)

    def trimtab_loading_fault(self, name: str) -> str | None:
        """None while it is being loaded; afterwards what went wrong, empty where nothing did."""
        loading = _here().loading[name]
        if not loading.done():
            return None
        if (error := loading.exception()) is None:
            return ""
        logger.error("trimtab: the control %r can't be loaded", name, exc_info=error)
        return str(error) or repr(error)

    def trimtab_end_loading(self, name: str, install: bool) -> None:
        """Let requests name what was loaded, or forget it."""
        desk = _here()
        loading = desk.loading.pop(name)
        if install:
            desk.settle()
            desk.runtime.install(loading.result(timeout=0))
            logger.info("trimtab: the control %r is loaded", name)

    def trimtab_unload(self, name: str) -> None:
        """Let no further request name a control."""
        desk = _here()
        desk.settle()
        desk.synchronize()
        desk.runtime.unload(name)
        logger.info("trimtab: the control %r is unloaded", name)

    def trimtab_describe(self) -> dict[str, Any]:
        """Return the controls that requests may name, and an id that changes with every start."""
        controls = [control.describe() for control in _here().runtime.controls]
        return {"instance": _INSTANCE, "controls": controls}


def _here() -> _Desk:
    if _desk is None:
        raise RuntimeError("this engine has no control processor of trimtab's")
    return _desk
