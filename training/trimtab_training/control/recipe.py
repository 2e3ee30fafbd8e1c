"""The keys of a training recipe. Those that transformers' TrainingArguments has bear the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trimtab_processors.pack import MAX_STRENGTH, ControlName
from trimtab_training.recipe_file import Section

Format = Literal["messages", "alpaca", "sharegpt", "prompt_completion", "text", "tofu"]
ObjectiveName = Literal["cross_entropy", "forget", "npo", "retain", "distill"]
Tracker = Literal["none", "tensorboard", "wandb"]
Factor = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]

_OWN_KEYS = {"bound": ("forget",), "beta": ("npo",), "teacher": ("distill", "cross_entropy")}
_SERVER_KEYS = ("model", "api_key_env", "control", "top_logprobs", "requests_at_once")

_BY_METRIC = frozenset({"reduce_lr_on_plateau", "greedy"})
"""Schedules that follow a metric of an evaluation, which a training does not have."""


class Architecture(Section):
    """A fresh Llama. `intermediate_size` is three times `hidden_size` if it is not given."""

    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    max_position_embeddings: PositiveInt = 2048
    tie_word_embeddings: bool = True
    initializer_range: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                "`hidden_size` must be a multiple of twice `num_attention_heads`"
                f" ({self.num_attention_heads}), got {self.hidden_size}"
            )
        return self


class ControlModel(Section):
    """The model that is trained: a checkpoint, or a fresh one."""

    model_name_or_path: str | None = None
    revision: str | None = None
    config: Architecture | None = None
    tokenizer_name: str | None = None
    """Whose vocabulary a fresh model has. With a template it may be left out: it is the template's then."""

    @model_validator(mode="after")
    def _one_source(self) -> ControlModel:
        if (self.model_name_or_path is None) == (self.config is None):
            raise ValueError("give either `model_name_or_path` (a checkpoint) or `config` (a fresh model)")
        return self


class TemplateModel(Section):
    """The frozen model that the control is trained beside."""

    model_name_or_path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    cache: Literal["none", "exact", "top_k"] = "none"
    top_k: PositiveInt = 256
    cache_dir: Path = Path("~/.cache/trimtab/template")


class Teacher(Section):
    """Who is learned from: the template itself behind a system prompt, or a model behind a server."""

    system_prompt: str | None = None
    base_url: str | None = None
    """That of an OpenAI-compatible server, with `/v1`; None: the template."""
    model: str | None = None
    api_key_env: str | None = None
    """The environment variable that holds the API key."""
    control: Any = None
    """The request's field `control`, for a gateway of Trimtab."""
    top_logprobs: PositiveInt = 20
    requests_at_once: PositiveInt = 16

    @model_validator(mode="after")
    def _one_kind(self) -> Teacher:
        if self.base_url is not None and self.model is None:
            raise ValueError(
                "`model` is missing: the name by which the server at `base_url` knows the teacher"
            )
        if self.base_url is None:
            for key in _SERVER_KEYS:
                if key in self.model_fields_set:
                    raise ValueError(f"`{key}` belongs to a teacher with a `base_url`")
            if self.system_prompt is None:
                raise ValueError("give a `system_prompt` (the template is the teacher) or a `base_url`")
        return self


class DataSet(Section):
    """Records of one format under one objective."""

    path: str | list[str]
    format: Format
    columns: dict[str, str] = Field(default_factory=dict)
    name: str | None = None
    objective: ObjectiveName = "cross_entropy"
    weight: PositiveFloat = 1.0
    per_device_train_batch_size: PositiveInt | None = None
    bound: PositiveFloat | None = 5.0
    beta: PositiveFloat = 0.1
    teacher: Teacher | None = None
    answers: Literal["given", "generate"] = "given"
    max_new_tokens: PositiveInt = 64

    @model_validator(mode="after")
    def _keys_of_generation(self) -> DataSet:
        if self.answers == "generate" and self.format in ("text", "prompt_completion"):
            raise ValueError(f"`answers: generate` needs a format with conversations, got `{self.format}`")
        if "max_new_tokens" in self.model_fields_set and self.answers == "given":
            raise ValueError("`max_new_tokens` belongs to `answers: generate`")
        return self

    @model_validator(mode="after")
    def _keys_of_the_objective(self) -> DataSet:
        for key, objectives in _OWN_KEYS.items():
            if key in self.model_fields_set and self.objective not in objectives:
                raise ValueError(
                    f"`{key}` belongs to the objective `{objectives[0]}`, not to `{self.objective}`"
                )
        if self.objective == "distill" and self.teacher is None:
            raise ValueError("the objective `distill` needs a `teacher`, for instance `{system_prompt: ...}`")
        return self

    @model_validator(mode="after")
    def _keys_of_the_teacher(self) -> DataSet:
        if self.server is not None and self.answers == "given":
            raise ValueError(
                "a teacher behind a server gives distributions along its own answers only."
                " Set `answers: generate`, or leave `teacher.base_url` out"
            )
        if self.objective == "cross_entropy" and self.teacher is not None and self.server is None:
            raise ValueError(
                "`teacher` without a `base_url` belongs to the objective `distill`, not to `cross_entropy`"
            )
        return self

    @property
    def server(self) -> Teacher | None:
        """The teacher, if it is behind a server."""
        return self.teacher if self.teacher is not None and self.teacher.base_url is not None else None

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class TrainRecipe(Section):
    """The keys of every recipe of `trimtab train`."""

    name: ControlName = "control"
    description: str = ""
    control: ControlModel
    output_dir: Path

    chat_template: str | None = None
    """A Jinja template, or a file with one, in place of the tokenizer's own."""
    max_length: PositiveInt = 1024

    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 5e-5
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: NonNegativeFloat = 0.9
    adam_beta2: NonNegativeFloat = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    num_train_epochs: PositiveFloat = 3.0
    max_steps: int = Field(default=-1, ge=-1)
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, float] = Field(default_factory=dict)
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    warmup_steps: NonNegativeInt = 0
    bf16: bool = False
    fp16: bool = False
    seed: NonNegativeInt = 42
    use_cpu: bool = False

    logging_steps: PositiveInt = 10
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt | None = None
    report_to: Tracker | list[Tracker] = "none"
    run_name: str | None = None
    resume_from_checkpoint: bool | Path = False
    overwrite_output_dir: bool = False

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("`bf16` and `fp16` exclude each other: set one of them to false")
        return self

    @model_validator(mode="after")
    def _known_schedule(self) -> Self:
        from transformers.trainer_utils import SchedulerType  # noqa: PLC0415 - slow to import

        kinds = [str(kind.value) for kind in SchedulerType if kind.value not in _BY_METRIC]
        if self.lr_scheduler_type not in kinds:
            raise ValueError(
                f"`lr_scheduler_type` must be one of {', '.join(kinds)}, got {self.lr_scheduler_type!r}"
            )
        return self

    @property
    def strengths(self) -> tuple[float, float]:
        """The range of the factor on the trained model's logits."""
        return 1.0, 1.0

    @property
    def penalty(self) -> float:
        """The factor on the mean square of the trained model's logits."""
        return 0.0

    @property
    def trackers(self) -> list[str]:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]

    @property
    def mixed_precision(self) -> str:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    def batch_size(self, data_set: DataSet) -> int:
        """The records of `data_set` in a forward pass of one device."""
        return data_set.per_device_train_batch_size or self.per_device_train_batch_size


class ControlRecipe(TrainRecipe):
    """A control that is trained beside a template."""

    kind: Literal["control"] = "control"
    template: TemplateModel
    datasets: list[DataSet] = Field(min_length=1)
    strength: Factor | tuple[Factor, Factor] = 1.0
    shift_penalty: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _ordered_strengths(self) -> Self:
        low, high = self.strengths
        if low > high:
            raise ValueError(f"`strength` must be a number or [lowest, highest], got [{low}, {high}]")
        return self

    @property
    def strengths(self) -> tuple[float, float]:
        return self.strength if isinstance(self.strength, tuple) else (self.strength, self.strength)

    @property
    def penalty(self) -> float:
        return self.shift_penalty
