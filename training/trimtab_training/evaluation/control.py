"""A control beside a target: the runtime that the server's plugin uses, without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trimtab_mappings import Vocabulary, load_encoder, load_tokenizer
from trimtab_mappings.vocabulary import VocabularyError
from trimtab_processors.alignment import Aligner
from trimtab_processors.control import Target
from trimtab_processors.pack import PackError, RoutingName, load_pack
from trimtab_processors.parameters import Parameters
from trimtab_processors.runtime import Request, Runtime
from trimtab_training.evaluation.recipe import EvalRecipe
from trimtab_training.evaluation.target import Chat, LoadedTarget, render
from trimtab_training.recipe_file import RecipeError

_NAME = "control"


class Setting(NamedTuple):
    """How a control is applied."""

    strength: float
    routing: RoutingName | None
    """None: without control, at strength 0."""


def settings_of(recipe: EvalRecipe) -> list[Setting]:
    """All combinations of strength and routing; strength 0 once."""
    plain = [Setting(0.0, None)] if 0.0 in recipe.strengths else []
    controlled = [
        Setting(strength, routing) for routing in recipe.routings for strength in recipe.strengths if strength
    ]
    return plain + controlled


class LoadedControl:
    """A pack beside one target."""

    def __init__(self, location: str, target: LoadedTarget, tables: Path) -> None:
        """Load the pack, and its mapping table, which is built if `tables` has none.

        Raises:
            RecipeError: the pack or its tokenizer can't be used with this target.
        """
        try:
            pack = load_pack(location)
            self._tokenizer = load_tokenizer(pack.components[0].model)
            encoder = load_encoder(target.name)
            steered = Target(target.name, encoder, target.width, target.device)
            self.runtime = Runtime(steered, {_NAME: location}, tables=tables.expanduser(), kl_every=0)
        except (PackError, VocabularyError) as error:
            raise RecipeError(f"`control`: {error}") from error
        self._template = pack.chat_template
        (self._control,) = self.runtime.controls
        self._prefixes = self._encoding_aligner(encoder.vocabulary)

    def encode(self, chat: Chat | None) -> list[int] | None:
        """A conversation in the control's own chat template; None if there is none: the control then reads
        the text of the target's prompt.
        """
        if chat is None or (self._template is None and self._tokenizer.chat_template is None):
            return None
        return render(self._tokenizer, chat, self._template)

    def open(
        self, setting: Setting, prompt: list[int], own_prompt: Sequence[int] | None, output: list[int]
    ) -> Request | None:
        """Follow `output`, to which the caller appends what the target generates; None at strength 0."""
        if setting.routing is None:
            return None
        parameters = Parameters(
            control=_NAME,
            strength=setting.strength,
            routing=setting.routing,
            prompt=None if own_prompt is None else tuple(own_prompt),
        )
        return self.runtime.open(parameters, prompt, output)

    def close(self, requests: Sequence[Request]) -> None:
        """Release what requests hold."""
        for request in requests:
            self.runtime.close(request)

    @contextmanager
    def encoding_prefixes(self) -> Iterator[None]:
        """Let requests that are opened meanwhile have all their text encoded anew after every token.

        Others have a token that both vocabularies have appended as it is, as a worker does. In the same
        vocabulary there is no difference: the control has the target's own tokens.
        """
        served = self._control.aligner
        self._control.aligner = self._prefixes
        try:
            yield
        finally:
            self._control.aligner = served

    def _encoding_aligner(self, target: Vocabulary) -> Aligner:
        """As the worker's, but no token of a foreign vocabulary is appended as it is."""
        encoder = self._control.aligner.encoder
        aligner = Aligner(target, encoder, self._control.table)
        if target.tokens != encoder.vocabulary.tokens:
            aligner.exact = [False] * len(aligner.exact)
        return aligner
