"""What can be said of a configuration before anything is started: a line for each thing that it names."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trimtab_mappings import MappingTable, TableError, Vocabulary, VocabularyError, load_vocabulary
from trimtab_mappings.strategies import DEFAULT as STRATEGY
from trimtab_processors.pack import PackError, load_pack
from trimtab_server.config.schema import ModelSettings, Settings
from trimtab_server.config.sections import ReplicaSettings, Tls
from trimtab_server.config.tls import check_files
from trimtab_server.config.types import SettingsError
from trimtab_server.engines.vllm.flags import CONTROL_PROCESSOR

_NOT_LOOKED_UP = "hub id, not looked up"
_CORES = re.compile(r"\d+(-\d+)?([,|]\d+(-\d+)?)*")
"""Cores as vLLM takes them; | stands between those of several ranks."""


@dataclass(frozen=True)
class Finding:
    """What was found at one place of the configuration."""

    place: str
    text: str
    is_fault: bool = False
    """Whether the gateway, or a model of it, could not start so."""

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.text.split())}"


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Look at everything that `settings` names on this machine; nothing is started, built or fetched."""
    for name, model in settings.models.items():
        yield from _elsewhere(f"models.{name}", model)
        if model.model is not None:
            yield _model(f"models.{name}", model.model, model, controlled=bool(settings.controls_of(name)))
    for name, location in settings.controls.items():
        yield from _pack(f"controls.{name}", location)
    for name in settings.models:
        yield from _tables(settings, name)
    for name, model in settings.models.items():
        yield from _hardware(f"models.{name}", model)
    yield from _doors(settings)


def _elsewhere(place: str, model: ModelSettings) -> Iterator[Finding]:
    for i, replica in enumerate(model.replicas):
        if replica.url is not None:
            yield Finding(f"{place}.replicas.{i}", f"{replica.url} (elsewhere, not asked)")
        for key, variable in replica.key_variables.items():
            if not os.environ.get(variable):
                where = f"{place}.replicas.{i}.{key}"
                yield Finding(where, f"the environment has no {variable}", is_fault=True)


def _model(place: str, location: str, model: ModelSettings, *, controlled: bool) -> Finding:
    directory = Path(location)
    if not directory.exists():
        return Finding(place, f"{location} ({_NOT_LOOKED_UP})")
    if not directory.is_dir():
        return Finding(place, f"{location} (a file, not looked into)")
    if not any((directory / name).is_file() for name in ("config.json", "params.json")):
        return Finding(place, f"{directory} has no config.json", is_fault=True)
    tokenizer = _tokenizer(model)
    if not Path(tokenizer).exists():
        return Finding(place, f"{directory} (directory), with the tokenizer {tokenizer} ({_NOT_LOOKED_UP})")
    try:
        return Finding(place, f"{directory} (directory), {_tokens(tokenizer)}")
    except VocabularyError as error:
        # Without a control, only vLLM has to understand its tokenizer.
        return Finding(place, str(error), is_fault=controlled)


def _tokenizer(model: ModelSettings) -> str:
    """Where the tokenizer of a model is: with it, unless a flag of vLLM's says otherwise."""
    return str(model.args.get("tokenizer", model.model))


@cache
def _vocabulary(location: str) -> Vocabulary:
    return load_vocabulary(location)


def _tokens(location: str) -> str:
    vocabulary = _vocabulary(location)
    end = (
        ""
        if "eos" in vocabulary.roles
        else ", none of them an eos: a control has no say in where answers end"
    )
    return f"{len(vocabulary.tokens)} tokens{end}"


def _pack(place: str, location: str) -> Iterator[Finding]:
    if not Path(location).exists():
        yield Finding(place, f"{location} ({_NOT_LOOKED_UP})")
        return
    try:
        pack = load_pack(location)
    except (PackError, OSError) as error:
        yield Finding(place, str(error), is_fault=True)
        return
    for component in pack.components:
        yield from _component(place, component.model)


def _component(place: str, location: str) -> Iterator[Finding]:
    directory = Path(location)
    if not directory.exists():
        yield Finding(place, f"{location} ({_NOT_LOOKED_UP})")
        return
    faults = []
    try:
        _vocabulary(location)
    except VocabularyError as error:
        faults.append(str(error))
    if not (directory / "config.json").is_file():
        faults.append(f"{directory} has no config.json")
    if not any(directory.glob("*.safetensors")):
        faults.append(f"{directory} has no weights in *.safetensors")
    for fault in faults:
        yield Finding(place, fault, is_fault=True)
    if not faults:
        yield Finding(place, f"{directory} (directory), {_tokens(location)}")


def _tables(settings: Settings, name: str) -> Iterator[Finding]:
    """The table of a model that is started here for each of its controls, where both are on this machine."""
    model = settings.models[name]
    if model.model is None or CONTROL_PROCESSOR not in model.processors:
        return
    for control, location in settings.controls_of(name).items():
        try:
            places = (_tokenizer(model), load_pack(location).components[0].model)
            if all(Path(place).exists() for place in places):
                target, own = map(_vocabulary, places)
                yield Finding(f"models.{name} with {control}", _table(settings.tables, target, own))
        except (PackError, VocabularyError, OSError):
            continue  # it has been said of the model or of the pack


def _table(directory: Path, target: Vocabulary, control: Vocabulary) -> str:
    # As trimtab_mappings.building.cached_table names it.
    fingerprints = (target.fingerprint[:16], control.fingerprint[:16])
    path = directory / f"{'-'.join((*fingerprints, STRATEGY))}.safetensors"
    if not path.exists():
        return "the mapping table will be built at start"
    try:
        table = MappingTable.load(path)
        table.check(target, control)
    except TableError as error:
        return f"the mapping table will be built anew at start: {error}"
    return f"the mapping table {path}, {table.coverage.exact} of {len(table.mapping)} tokens exact"


def _hardware(place: str, model: ModelSettings) -> Iterator[Finding]:
    for i, replica in enumerate(model.replicas):
        yield from _devices(f"{place}.replicas.{i}.devices", replica)
        if replica.cpus is not None:
            yield from _cores(f"{place}.replicas.{i}.cpus", replica.cpus)
    if model.plugin.control_cpus:
        yield from _cores(f"{place}.plugin.control_cpus", ",".join(map(str, model.plugin.control_cpus)))


def _devices(place: str, replica: ReplicaSettings) -> Iterator[Finding]:
    if not replica.devices:
        return
    named = ", ".join(map(str, replica.devices))
    count = _cuda_devices()
    if count is None:
        yield Finding(place, f"{named}: not looked up, torch sees no CUDA here, or not all of it")
        return
    missing = [device for device in replica.devices if isinstance(device, int) and device >= count]
    if missing:
        text = f"there is no device {', '.join(map(str, missing))}; there are {count}, counted from 0"
        yield Finding(place, text, is_fault=True)
    else:
        yield Finding(place, f"{named} of {count} CUDA devices")


@cache
def _cuda_devices() -> int | None:
    """How many there are; None where torch sees none, or where the environment hides some from it."""
    import torch  # noqa: PLC0415 - heavy

    if "CUDA_VISIBLE_DEVICES" in os.environ or not torch.cuda.is_available():
        return None
    return torch.cuda.device_count()


def _cores(place: str, text: str) -> Iterator[Finding]:
    if not _CORES.fullmatch(text):
        yield Finding(place, f"{text}: no list of cores, left to vLLM")
        return
    ranges = (part.partition("-") for part in re.split(r"[,|]", text))
    wanted = {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}
    here = os.sched_getaffinity(0)
    if missing := sorted(wanted - here):
        text = f"no core {_listed(missing)} for this process; it has {_listed(sorted(here))}"
        yield Finding(place, text, is_fault=True)
    else:
        yield Finding(place, f"{text}, of {len(here)} cores")


def _doors(settings: Settings) -> Iterator[Finding]:
    for i, root in enumerate(settings.control_roots):
        is_there = root.is_dir()
        text = str(root) if is_there else f"there is no directory {root}"
        yield Finding(f"control_roots.{i}", text, is_fault=not is_there)
    yield _attempt("api_keys_file", lambda: f"{len(settings.api_keys)} API keys")
    yield _attempt("admin_keys_file", lambda: f"{len(settings.admin_keys)} admin keys")
    if settings.tls is not None:
        yield _tls(settings.tls)
    yield _port(settings)


def _attempt(place: str, read: Callable[[], str]) -> Finding:
    try:
        return Finding(place, read())
    except SettingsError as error:
        return Finding(place, str(error).removeprefix(f"{place} "), is_fault=True)


def _tls(tls: Tls) -> Finding:
    try:
        check_files(tls)
    except SettingsError as error:
        place, _, text = str(error).partition(": ")
        return Finding(place, text, is_fault=True)
    return Finding("tls", f"{tls.certfile} and its key")


def _port(settings: Settings) -> Finding:
    address = (settings.host, settings.port)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            return Finding("port", f"{settings.host}:{settings.port} can't be had: {error}", is_fault=True)
    return Finding("port", f"{settings.host}:{settings.port} is free")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
