"""The recipe of `trimtab eval`: which model is asked what, under which control, how answers are scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from trimtab_processors.pack import RoutingName, Strength
from trimtab_processors.settings import DEFAULT_TABLES
from trimtab_training.evaluation.scores import REFUSALS, ScoreName
from trimtab_training.recipe_file import Section

_PATH: RoutingName = "path"
NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$"


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else [value]


class TargetSettings(Section):
    """The model that is asked."""

    model_name_or_path: Annotated[str, Field(min_length=1)]
    """A directory or a hub id; with `gateway`, the name under which the gateway serves it."""
    chat_template: str | None = None
    """A Jinja template, or a file that holds one; None: the tokenizer's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    """A device of torch; auto: the first GPU, or the CPU if there is none."""


class Message(Section):
    """A turn of a conversation."""

    role: str
    content: str


class Question(Section):
    """A question, and the answers that count as right. It is exactly one of a user's message, a
    conversation, or the beginning of a text.
    """

    question: str | None = None
    """A user's message."""
    messages: tuple[Message, ...] | None = None
    """A conversation that the model continues."""
    prompt: str | None = None
    """Raw text that the model continues, without a chat template."""
    answer: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """The expected answer, or a list of alternatives."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        given = [key for key in ("question", "messages", "prompt") if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(f"`{key}`" for key in given) or "none of them"
            raise ValueError(f"a record needs one of `question`, `messages` and `prompt`, got {found}")
        return self

    @property
    def text(self) -> str:
        """The question as a reader knows it."""
        return self.question or self.prompt or (self.messages or ())[-1].content

    def chat(self, system_prompt: str | None) -> list[dict[str, str]] | None:
        """The conversation; None for raw text."""
        if self.prompt:
            return None
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        turns = [message.model_dump() for message in self.messages or ()]
        return [*system, *(turns or [{"role": "user", "content": self.question or ""}])]


def _records(value: Any) -> Any:
    """Plain strings in a list are users' messages."""
    if not isinstance(value, list | tuple):
        return value
    return [{"question": item} if isinstance(item, str) else item for item in value]


Questions = Annotated[tuple[Question, ...], BeforeValidator(_records)] | str
"""A list of records, or a file of them: JSON Lines, JSON or YAML."""


class Group(Section):
    """Questions of one kind, which are scored alike."""

    name: Annotated[str, Field(pattern=NAME)]
    questions: Questions
    scores: Annotated[tuple[ScoreName, ...], BeforeValidator(_listed), Field(min_length=1)]

    @field_validator("questions")
    @classmethod
    def _has_some(cls, questions: Sequence[Question] | str) -> Sequence[Question] | str:
        if not questions:
            raise ValueError("there are no questions")
        return questions


class TofuSettings(Section):
    """The TOFU benchmark (arXiv 2401.06121), in the words of open-unlearning."""

    path: Path
    """The directory with `forget10_perturbed.json` and the other three files."""
    forget_split: Literal["forget01", "forget05", "forget10"] = "forget10"
    retain_logs_path: Path | None = None
    """The log of a model that never saw the forget set; None: no forget quality."""
    question_key: Literal["question", "paraphrased_question"] = "question"
    """Which question of the forget and retain sets is asked."""
    truth_ratio: Literal["geometric", "arithmetic"] = "geometric"
    """The mean over perturbed answers; `geometric` is open-unlearning's."""
    ds_size: Annotated[int, Field(ge=2)] | None = None
    """Only the first so many questions of each set; locuslab's figures are of 300."""
    answer_tag: str = ""
    """Text between the prompt and a given answer."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 200


class BootstrapSettings(Section):
    """Intervals: questions are drawn again, with replacement."""

    draws: Annotated[int, Field(ge=1)] = 1000
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: Annotated[int, Field(ge=0)] = 0


class EvalRecipe(Section):
    """What `trimtab eval` does."""

    target: TargetSettings
    control: str | None = None
    """A pack, a directory or a hub id; with `gateway`, the control's name there; None: no control."""
    gateway: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """The base URL of a running gateway, which is asked instead of a model here: http://localhost:8000/v1."""
    strengths: Annotated[tuple[Strength, ...], BeforeValidator(_listed), Field(min_length=1)] = (0.0, 1.0)
    """Strength 0 is the target without control."""
    routings: Annotated[tuple[RoutingName, ...], BeforeValidator(_listed), Field(min_length=1)] = (_PATH,)
    groups: tuple[Group, ...] = ()
    tofu: TofuSettings | None = None
    system_prompt: str | None = None
    """The first message of every conversation, for target and control."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    stop: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """An answer ends before any of these."""
    refusals: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = REFUSALS
    """Phrases by which `refuses` knows a refusal."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 16
    """Number of answers that are generated together."""
    bootstrap: BootstrapSettings = BootstrapSettings()
    tables: Path = DEFAULT_TABLES
    """Where mapping tables are kept."""
    output_dir: Path
    overwrite_output_dir: bool = False

    @field_validator("strengths", "routings", "groups", "stop")
    @classmethod
    def _differ(cls, values: Sequence[Any]) -> Sequence[Any]:
        names = [value.name if isinstance(value, Group) else value for value in values]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{double!r} is listed twice")
        return values

    @model_validator(mode="after")
    def _control_is_there(self) -> Self:
        if self.control is None and any(self.strengths):
            raise ValueError("`control` is missing: `strengths` other than 0 need a control")
        return self

    @model_validator(mode="after")
    def _gateway_can_do_it(self) -> Self:
        if self.gateway is not None and self.tofu is not None:
            raise ValueError(
                "`tofu` needs log-likelihoods, which a gateway does not give: leave `gateway` out"
            )
        if self.gateway is not None and self.target.chat_template is not None:
            raise ValueError(
                "`target.chat_template` has no effect with `gateway`: the served model has its own"
            )
        return self

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.groups and self.tofu is None:
            raise ValueError("`groups` and `tofu` are missing: there is nothing to ask")
        return self


def is_file_name(text: str) -> bool:
    """Whether `text` names a file rather than being a Jinja template."""
    return not re.search(r"[{}\n]", text)
