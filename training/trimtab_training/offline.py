"""Answers of the small world's models without a server."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trimtab_training.evaluate import Answer, Question
from trimtab_training.steer import Steered, load
from trimtab_training.world import World


def offline_answer(world: World, model: str) -> Answer:
    """Load the base model `model` of `world` and its control, and give what answers questions."""
    target, control = load(world.models[model]), load(world.control)
    steered = Steered(target, control)

    def answer(asked: Sequence[Question], strength: float) -> list[str]:
        answers: dict[Question, str] = {}
        for kind in dict.fromkeys(question.kind for question in asked):
            batch = [question for question in asked if question.kind is kind]
            texts = steered.generate(
                [_prompt(target.tokenizer, question) for question in batch],
                [_prompt(control.tokenizer, question) for question in batch],
                strength=strength,
                max_tokens=batch[0].max_tokens,
            )
            answers.update(zip(batch, texts, strict=True))
        return [answers[question] for question in asked]

    return answer


def _prompt(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    if not question.kind.is_chat:
        return list(tokenizer.encode(question.text))
    messages = [{"role": "user", "content": question.text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)
