"""Shifts, against both models' logits after each prefix alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from trimtab_training.evaluation.recipe import Question
from trimtab_training.similarity.positions import Passage, Position, common_positions
from trimtab_training.similarity.recipe import ComparedModel, SimilarityRecipe
from trimtab_training.similarity.shifts import Reader, measure_shifts

TOP_K = 7
PASSAGES = [
    Passage(None, "Bako litu, naïve."),
    Passage(Question(question="Where is Bako?"), "In Litu."),
    Passage(Question(prompt="Zolo is"), " litu mavo."),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Base and tuned: of one tokenizer, padded by different numbers of tokens."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny.byte_level(600)
    tiny.save(root / "base", tokenizer, tiny.llama(len(tokenizer) + 4), seed=1)
    tiny.save(root / "tuned", tokenizer, tiny.llama(len(tokenizer) + 9), seed=2)
    return ComparedModel(name="m", base=str(root / "base"), tuned=str(root / "tuned"), task="t")


def measured(model, tmp_path, **keys):
    both = [model, model.model_copy(update={"name": "n"})]
    data = {"models": both, "texts": "x", "top_k": TOP_K, "output_dir": tmp_path, "device": "cpu"}
    reader = Reader(model)
    readings = [reader.read(passage) for passage in PASSAGES]
    positions = common_positions([readings])
    recipe = SimilarityRecipe.model_validate(data | keys)
    return positions, measure_shifts(reader, readings, positions, recipe, lambda _line: None)


def logits_after(location: str, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(location)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1, :600]


def prefix(tokenizer, passage: Passage, offset: int) -> list[int]:
    """The prompt and the first `offset` bytes, encoded by themselves."""
    text = passage.text.encode()[:offset].decode()
    if passage.prompt is None:
        return tokenizer(text).input_ids
    if passage.prompt.prompt:
        return tokenizer(passage.prompt.prompt + text).input_ids
    chat = tokenizer.apply_chat_template(
        passage.prompt.chat(None), add_generation_prompt=True, tokenize=False
    )
    return tokenizer(chat + text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("compared", ["base", "tuned"])
def test_a_shift_is_that_of_the_logits_after_the_text_before_the_position(model, tmp_path, compared):
    positions, shifts = measured(model, tmp_path, top_k_of=compared)
    tokenizer = Reader(model).encoder.tokenizer
    assert shifts.values.shape == (len(positions), 600)
    ends = [Position(number, len(passage.text.encode())) for number, passage in enumerate(PASSAGES)]
    for position in (Position(0, len("Bako")), Position(1, 0), Position(2, 0), *ends):
        ids = prefix(tokenizer, PASSAGES[position.passage], position.offset)
        logits = {name: logits_after(getattr(model, name), ids) for name in ("base", "tuned")}
        place = positions.index(position)
        assert shifts.values[place] == pytest.approx(logits["tuned"] - logits["base"], abs=1e-4)
        assert shifts.likeliest[place].tolist() == logits[compared].topk(TOP_K).indices.tolist()


def test_a_system_prompt_is_before_the_question(model):
    reader = Reader(model)
    with_it, without = (reader.read(PASSAGES[1], prompt) for prompt in ("Be brief.", None))
    assert "Be brief." in reader.encoder.tokenizer.decode(with_it.ids)
    assert with_it.ends.keys() == without.ends.keys()
