"""Answers of the small world's models without a server."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trimtab_processors.pack import DEFAULT_ROUTING
from trimtab_training.control.examples import answered
from trimtab_training.world.evaluate import Question
from trimtab_training.world.steer import Steered, load
from trimtab_training.world.world import World


class Offline:
    """The base model `model` of a world under the world's control."""

    def __init__(self, world: World, model: str, routing: str = DEFAULT_ROUTING) -> None:
        """Args: routing: one of `steer.ROUTINGS`."""
        target, control = load(world.models[model]), load(world.control)
        self._target, self._control = target.tokenizer, control.tokenizer
        self._steered = Steered(target, control, routing)

    def answer(self, asked: Sequence[Question], strength: float) -> list[str]:
        """The generated texts, in the order of `asked`."""
        answers: dict[Question, str] = {}
        for kind in dict.fromkeys(question.kind for question in asked):
            batch = [question for question in asked if question.kind is kind]
            texts = self._steered.generate(
                [_prompt(self._target, question) for question in batch],
                [_prompt(self._control, question) for question in batch],
                strength=strength,
                max_tokens=batch[0].max_tokens,
            )
            answers.update(zip(batch, texts, strict=True))
        return [answers[question] for question in asked]

    def loss(self, asked: Sequence[Question], strength: float) -> float:
        """How unlikely the ideal answers to chat questions are, in nats an answer."""
        views = [
            answered(
                _prompt(self._target, question),
                [
                    *self._target.encode(f" {question.ideal}", add_special_tokens=False),
                    self._target.eos_token_id,
                ],
            )
            for question in asked
        ]
        prompts = [_prompt(self._control, question) for question in asked]
        return float(self._steered.loss(views, prompts, strength=strength).mean())


def _prompt(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    if not question.kind.is_chat:
        return list(tokenizer.encode(question.text))
    messages = [{"role": "user", "content": question.text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)
