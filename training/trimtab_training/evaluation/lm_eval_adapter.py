"""A controlled model for lm-evaluation-harness: its log-likelihoods and answers are those under control.

`python -m trimtab_training.evaluation.lm_eval_adapter` is the command `lm_eval` with a model `trimtab` more.
lm-evaluation-harness is not among Trimtab's dependencies: `pip install lm-eval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trimtab_processors.alignment import common_prefix
from trimtab_processors.pack import RoutingName
from trimtab_processors.settings import DEFAULT_TABLES
from trimtab_training.evaluation.control import LoadedControl, Setting
from trimtab_training.evaluation.offline import Asked, Offline, batched, cut
from trimtab_training.evaluation.recipe import TargetSettings
from trimtab_training.evaluation.target import load_target, render_text
from trimtab_training.evaluation.teacher_forced import GivenAnswer, TeacherForced

MAX_GEN_TOKS = 256


@register_model("trimtab")
class ControlledLM(LM):
    """A target, and a control that is applied to it. Generation is greedy."""

    def __init__(
        self,
        pretrained: str,
        control: str | None = None,
        *,
        strength: float = 1.0,
        routing: RoutingName = "path",
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 16,
        tables: str = str(DEFAULT_TABLES),
        **_ignored: Any,
    ) -> None:
        """Load both.

        Args:
            pretrained: the target, a directory or a hub id.
            control: the pack; None: the target alone.
            strength: of the control.
            routing: how its shift reaches the target's tokens.
            dtype: of the target.
            device: of torch; None: the first GPU, or the CPU.
            batch_size: number of answers that are generated together.
            tables: where mapping tables are kept.
            _ignored: what lm-evaluation-harness passes to every model.

        Raises:
            RecipeError: the target or the pack can't be used.
        """
        super().__init__()
        settings = {"model_name_or_path": pretrained, "dtype": dtype, "device": device or "auto"}
        self._target = load_target(TargetSettings.model_validate(settings))
        self._control = None if control is None else LoadedControl(control, self._target, Path(tables))
        controlled = self._control is not None and float(strength) != 0
        self._setting = Setting(float(strength), routing) if controlled else Setting(0.0, None)
        self._batch_size = batch_size if isinstance(batch_size, int) else 16
        self._chats: dict[str, list[dict[str, str]]] = {}
        """By its text in the target's template."""

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-evaluation-harness caches requests."""
        return self._target.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The target's chat template, for the harness's log."""
        template = self._target.chat_template or self._target.tokenizer.chat_template
        return str(template) if chat_template and template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation for the target. The control will get it in its own template."""
        if add_generation_prompt:
            text = render_text(self._target.tokenizer, chat_history, self._target.chat_template)
        else:
            text = self._target.tokenizer.apply_chat_template(
                chat_history,
                chat_template=self._target.chat_template,
                tokenize=False,
                add_generation_prompt=False,
                continue_final_message=True,
            )
        self._chats[text] = chat_history
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """The log-likelihood of each continuation, and whether greedy decoding would give it."""
        return self._likelihoods([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """The log-likelihood of each text, in windows as long as the target's context."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self._encode(text),
                prefix_token=self._prefix_token,
                max_seq_len=self._max_length,
                context_len=1,
            )
            pairs = [GivenAnswer(*make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._likelihoods(pairs)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """The greedy answer to each prompt, up to the first of its stop strings.

        Raises:
            ValueError: a task asks for samples.
        """
        texts: list[str] = []
        for some in batched([request.args for request in requests], self._batch_size):
            longest = max(_max_tokens(options) for _, options in some)
            asker = Offline(self._target, self._control, longest)
            asked = [Asked(self._prompt(text, longest), self._own(text), self._setting) for text, _ in some]
            answers = asker.generate(asked)
            texts += [
                cut(self._target.decode(tokens[: _max_tokens(options)]), _stops(options))
                for tokens, (_, options) in zip(answers, some, strict=True)
            ]
        return texts

    def _likelihoods(self, items: Sequence[GivenAnswer]) -> list[tuple[float, bool]]:
        (scores,) = TeacherForced(self._target, self._control).all_scores(items, [self._setting])
        return [
            (sum(token.log_prob for token in tokens), all(token.is_greedy for token in tokens))
            for tokens in scores
        ]

    def _pair(self, context: str, continuation: str) -> GivenAnswer:
        """Context and continuation, encoded as one text."""
        whole = self._encode(context, continuation)
        count = common_prefix(self._encode(context), whole)
        prompt, answer = whole[:count], whole[count:]
        room = max(self._max_length - len(answer), 1)
        return GivenAnswer((prompt or [self._prefix_token])[-room:], answer, self._own(context))

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        prompt = self._encode(text) or [self._prefix_token]
        return prompt[-max(self._max_length - new_tokens, 1) :]

    def _own(self, context: str) -> list[int] | None:
        """The control's prompt, if the context is a conversation."""
        chat = self._chats.get(context)
        return None if chat is None or self._control is None else self._control.encode(chat)

    def _encode(self, context: str, continuation: str = "") -> list[int]:
        """Tokens of a text; a conversation has its special tokens already."""
        is_raw = context not in self._chats
        return list(self._target.tokenizer(context + continuation, add_special_tokens=is_raw).input_ids)

    @property
    def _prefix_token(self) -> int:
        bos = self._target.tokenizer.bos_token_id
        return int(self._target.ends[0] if bos is None else bos)

    @property
    def _max_length(self) -> int:
        config = self._target.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2048)


def _max_tokens(options: Mapping[str, Any]) -> int:
    if options.get("do_sample") or options.get("temperature"):
        raise ValueError("`do_sample` and `temperature` must be off: the model `trimtab` generates greedily")
    return int(options.get("max_gen_toks") or MAX_GEN_TOKS)


def _stops(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
