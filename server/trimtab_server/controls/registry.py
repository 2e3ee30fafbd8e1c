"""Controls: which there are, and which ones a request gets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trimtab_mappings import VocabularyError
from trimtab_processors.pack import ONLY_V2_ROUTINGS, PATH, V2_ROUTINGS, Pack, PackError, load_pack
from trimtab_processors.parameters import PREFIX, ControlOptions, Parameters
from trimtab_server.config.schema import Settings
from trimtab_server.config.types import SettingsError
from trimtab_server.controls.prompts import PromptRenderer, load_renderer
from trimtab_server.controls.request import FIELD, OFF, ControlRequest, Selection
from trimtab_server.errors import BadRequestError

XARGS = "vllm_xargs"


@dataclass(eq=False)
class Control:
    """A control that can be asked for."""

    name: str
    pack: Pack
    renderer: PromptRenderer | None
    """None: it has no chat template; the plugin then uses the text of the target's prompt."""
    loaded_from: str | None = None
    """Where its pack is, if it came while the gateway ran; None: the configuration has it."""
    models: tuple[str, ...] = ()
    """The models that offer it."""
    _users: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """For as long as a request is under way that has it."""
        self._users += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def wait_until_unused(self) -> None:
        await self._idle.wait()


@dataclass(frozen=True)
class ResolvedControl:
    """A control at a strength, as one request gets it."""

    control: Control
    options: ControlOptions

    @property
    def strength(self) -> float:
        return self.control.pack.strength if self.options.strength is None else self.options.strength

    def __str__(self) -> str:
        options = self.options.model_dump(exclude={"strength"}, exclude_none=True)
        said = (f";{key}={value}" for key, value in options.items())
        return f"{self.control.name}={self.strength!r}{''.join(said)}"

    def parameters(self, prompt: Sequence[int] | None) -> Parameters:
        """What the plugin is told; without a `prompt` of the control's own it takes the target's text."""
        own = None if prompt is None else tuple(prompt)
        options = self.options.model_dump() | {"strength": self.strength}
        return Parameters(control=self.control.name, prompt=own, **options)


ResolvedControls = Sequence[ResolvedControl]
"""The controls of a request, whose shifts are summed."""


def format_controls(choices: ResolvedControls) -> str:
    """What an answer says of what was applied."""
    return ",".join(map(str, choices)) or OFF


class ControlRegistry:
    """All controls, and the models that offer them; they may come and go."""

    def __init__(self, settings: Settings, controls: Mapping[str, Control]) -> None:
        self._controls = dict(controls)
        self._limit = settings.limits.controls_per_request
        self._defaults = {name: model.default_control for name, model in settings.models.items()}
        self._runners = {name: model.runner for name, model in settings.models.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._controls

    def __len__(self) -> int:
        return len(self._controls)

    def loaded(self, model: str) -> list[Control]:
        """What `model` offers beside what the configuration has."""
        return [
            control
            for control in self._controls.values()
            if control.loaded_from is not None and model in control.models
        ]

    def add(self, control: Control) -> None:
        """Offer a control from now on."""
        self._controls[control.name] = control

    def remove(self, name: str) -> Control:
        """Offer it no more; requests that have it keep it.

        Raises:
            KeyError: there is none of this name.
        """
        return self._controls.pop(name)

    def get(self, name: str) -> Control | None:
        return self._controls.get(name)

    def resolve(self, model: str, wanted: ControlRequest | None, param: str = FIELD) -> ResolvedControls:
        """The controls that a request to `model` gets.

        Args:
            model: a configured model's name.
            wanted: what the request says; None: nothing.
            param: where the request says it, which errors name.

        Raises:
            BadRequestError: the model does not offer what is wanted, or not so much at once.
        """
        selections = self._select(model, wanted, param)
        if len(selections) > self._limit:
            raise BadRequestError(
                f"{len(selections)} controls, more than the {self._limit} that a request may sum",
                param=param,
            )
        names = [selection.name for selection in selections]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadRequestError(f"control {twice[0][:80]!r} stands twice", param=param)
        return [self._choice(model, selection, param) for selection in selections]

    def names_for(self, model: str) -> list[str]:
        """The names of the controls that `model` offers."""
        return [name for name, control in self._controls.items() if model in control.models]

    def describe(self) -> list[dict[str, Any]]:
        """What `/v1/controls` lists."""
        return [
            {
                "id": name,
                "object": "control",
                "description": control.pack.description,
                "strength": control.pack.strength,
                "training": control.pack.training,
                "loaded": control.loaded_from is not None,
                "models": list(control.models),
                "default_for": [model for model, default in self._defaults.items() if default == name],
            }
            for name, control in self._controls.items()
        ]

    def _select(self, model: str, wanted: ControlRequest | None, param: str) -> Sequence[Selection]:
        if wanted is None:
            return self._default(model)
        if isinstance(wanted, bool):
            return (self._default(model) or self._only(model, param)) if wanted else ()
        return wanted

    def _choice(self, model: str, selection: Selection, param: str) -> ResolvedControl:
        control = self._controls.get(selection.name)
        if control is None or model not in control.models:
            raise BadRequestError(
                f"{model!r} has no control {selection.name[:80]!r}; it has: {self._listed(model)}",
                param=param,
                code="control_not_found",
            )
        if selection.routing not in (None, *V2_ROUTINGS) and self._runners[model] == "v2":
            raise BadRequestError(f"routing {selection.routing!r}: {ONLY_V2_ROUTINGS}", param=param)
        return ResolvedControl(control, ControlOptions(**selection.model_dump(exclude={"name"})))

    def _default(self, model: str) -> Sequence[Selection]:
        default = self._defaults[model]
        return () if default is None else (Selection(name=default),)

    def _only(self, model: str, param: str) -> Sequence[Selection]:
        offered = self.names_for(model)
        if len(offered) != 1:
            raise BadRequestError(
                f"`control` is on, but model {model!r} has no default. Available controls:"
                f" {self._listed(model)}",
                param=param,
            )
        return (Selection(name=offered[0]),)

    def _listed(self, model: str) -> str:
        return ", ".join(sorted(self.names_for(model))) or "none"


def load_controls(settings: Settings) -> dict[str, Control]:
    """Read every configured pack with its tokenizer.

    Raises:
        SettingsError: a pack or its tokenizer can't be read; the message names the control.
    """
    offers = {model: settings.controls_of(model) for model in settings.models}
    controls = {
        name: _configured(name, place, tuple(model for model, of in offers.items() if name in of))
        for name, place in settings.controls.items()
    }
    for control in controls.values():
        _require_its_routing(control, settings)
    return controls


def load_control(name: str, place: str, models: Sequence[str]) -> Control:
    """Read a pack that came while the gateway runs.

    Raises:
        PackError, VocabularyError: it or its tokenizer can't be read.
    """
    pack = load_pack(place)
    return Control(name, pack, load_renderer(pack), loaded_from=place, models=tuple(models))


def refuse_own_xargs(body: Mapping[str, Any]) -> None:
    """Keep `trimtab_` keys to the gateway: a client that wrote them would pass by what `resolve` holds it to.

    Raises:
        BadRequestError: the body's `vllm_xargs` has such a key.
    """
    xargs = body.get(XARGS)
    for key in xargs if isinstance(xargs, dict) else ():
        if key.startswith(PREFIX):
            message = f"vllm_xargs.{key[:80]} is the gateway's own: use the field `control` instead"
            raise BadRequestError(message, param=f"{XARGS}.{key[:80]}")


def _require_its_routing(control: Control, settings: Settings) -> None:
    if control.pack.routing in (None, *V2_ROUTINGS):
        return
    for name in control.models:
        model = settings.models[name]
        if model.runner == "v2" and model.plugin.routing is None:
            raise SettingsError(
                f"controls.{control.name}: its pack's routing is {control.pack.routing!r}, but models.{name}"
                f" has runner v2: {ONLY_V2_ROUTINGS} (`plugin: {{routing: {PATH}}}`, `runner: v1`)"
            )


def _configured(name: str, place: str, models: tuple[str, ...]) -> Control:
    try:
        pack = load_pack(place)
        return Control(name, pack, load_renderer(pack), models=models)
    except (PackError, VocabularyError) as error:
        raise SettingsError(f"controls.{name}: {error}") from error
