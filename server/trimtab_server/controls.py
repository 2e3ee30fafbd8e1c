"""Controls: which there are, and which one a request asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab_mappings import VocabularyError
from trimtab_processors.pack import Pack, PackError, Strength, load_pack
from trimtab_processors.parameters import PREFIX, Parameters, TopK, to_xargs
from trimtab_server.errors import BadRequestError
from trimtab_server.prompts import Prompter, load_prompter
from trimtab_server.settings import Settings, SettingsError

FIELD = "control"
XARGS = "vllm_xargs"
OFF = "off"
BEAM_SEARCH = "use_beam_search"


@dataclass(frozen=True)
class Control:
    """A control that can be asked for."""

    name: str
    pack: Pack
    prompter: Prompter | None
    """None: it has no chat template; the plugin then uses the text of the target's prompt."""


@dataclass(frozen=True)
class Choice:
    """A control at a strength, as one request gets it."""

    control: Control
    strength: float
    top_k: int | None = None
    """Only so many of the target's likeliest tokens are shifted; None: all of them."""

    def __str__(self) -> str:
        guard = "" if self.top_k is None else f";top_k={self.top_k}"
        return f"{self.control.name}={self.strength!r}{guard}"

    async def xargs(self, chat: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the plugin is told; `chat` is the body of a chat request, for a prompt of the control's own.

        Raises:
            BadRequestError: the control's template refuses the messages.
        """
        prompter = self.control.prompter
        ids = None if chat is None or prompter is None else await asyncio.to_thread(prompter.encode, chat)
        prompt = None if ids is None else tuple(ids)
        name = self.control.name
        return to_xargs([Parameters(control=name, strength=self.strength, prompt=prompt, top_k=self.top_k)])


class Selection(BaseModel):
    """`control` written as an object."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    strength: Strength | None = None
    top_k: TopK | None = None


class Catalogue:
    """All controls, and the models that offer them."""

    def __init__(self, settings: Settings, controls: Mapping[str, Control]) -> None:
        self._controls = controls
        self._offers = {model: tuple(settings.controls_of(model)) for model in settings.models}
        self._defaults = {name: model.default_control for name, model in settings.models.items()}

    def choose(self, model: str, wanted: Any) -> Choice | None:
        """The control that a request to `model` gets, None for none.

        Args:
            model: a configured model's name.
            wanted: the body's `control`; None where it has none.

        Raises:
            BadRequestError: `wanted` is malformed, or the model does not offer it.
        """
        selection = self._select(model, wanted)
        if selection is None:
            return None
        if selection.name not in self._offers[model]:
            raise BadRequestError(
                f"{model!r} has no control {selection.name[:80]!r}; it has: {self._listed(model)}",
                param=FIELD,
                code="control_not_found",
            )
        control = self._controls[selection.name]
        strength = control.pack.strength if selection.strength is None else selection.strength
        return Choice(control, strength, selection.top_k)

    def describe(self) -> list[dict[str, Any]]:
        """What `/v1/controls` lists."""
        return [
            {
                "id": name,
                "object": "control",
                "description": control.pack.description,
                "strength": control.pack.strength,
                "training": control.pack.training,
                "models": [model for model, offered in self._offers.items() if name in offered],
                "default_for": [model for model, default in self._defaults.items() if default == name],
            }
            for name, control in self._controls.items()
        ]

    def _select(self, model: str, wanted: Any) -> Selection | None:
        match wanted:
            case None:
                return self._default(model)
            case False:
                return None
            case True:
                return self._default(model) or self._only(model)
            case str():
                return Selection(name=wanted)
            case dict():
                return _selection(wanted)
        raise BadRequestError(
            f"control is true, false, a name, or an object with name, strength and top_k; got"
            f" {str(wanted)[:80]}",
            param=FIELD,
        )

    def _default(self, model: str) -> Selection | None:
        default = self._defaults[model]
        return None if default is None else Selection(name=default)

    def _only(self, model: str) -> Selection:
        if len(self._offers[model]) != 1:
            raise BadRequestError(
                f"control is true, but {model!r} has no default control; name one of: {self._listed(model)}",
                param=FIELD,
            )
        return Selection(name=self._offers[model][0])

    def _listed(self, model: str) -> str:
        return ", ".join(sorted(self._offers[model])) or "none"


def load_controls(settings: Settings) -> dict[str, Control]:
    """Read every configured pack with its tokenizer.

    Raises:
        SettingsError: a pack or its tokenizer can't be read; the message names the control.
    """
    return {name: _load(name, place) for name, place in settings.controls.items()}


def refuse_own_xargs(body: Mapping[str, Any]) -> None:
    """Keep `trimtab_` keys to the gateway: a client that wrote them would pass by what `choose` holds it to.

    Raises:
        BadRequestError: the body's `vllm_xargs` has such a key.
    """
    xargs = body.get(XARGS)
    for key in xargs if isinstance(xargs, dict) else ():
        if key.startswith(PREFIX):
            message = f"vllm_xargs.{key[:80]} is the gateway's own: use the field `control` instead"
            raise BadRequestError(message, param=f"{XARGS}.{key[:80]}")


def refuse_beam_search(body: Mapping[str, Any]) -> None:
    """Keep a control from being left out in silence: vLLM's beam search passes by its logits processors.

    Raises:
        BadRequestError: the body asks for beam search.
    """
    if body.get(BEAM_SEARCH):
        raise BadRequestError(
            "beam search can't be controlled: send `control: false` with it", param=BEAM_SEARCH
        )


def _load(name: str, place: str) -> Control:
    try:
        pack = load_pack(place)
        return Control(name, pack, load_prompter(pack))
    except (PackError, VocabularyError) as error:
        raise SettingsError(f"controls.{name}: {error}") from error


def _selection(wanted: dict[str, Any]) -> Selection:
    try:
        return Selection.model_validate(wanted)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        param = ".".join(map(str, (FIELD, *fault["loc"])))[:80]
        if fault["type"] == "extra_forbidden":
            message = f"{param}: unknown key; a control has: {', '.join(Selection.model_fields)}"
        elif fault["type"] == "missing":
            message = f"{param}: {fault['msg']}"
        else:
            message = f"{param}: {fault['msg']}, got {str(fault['input'])[:80]}"
        raise BadRequestError(message, param=param) from error
