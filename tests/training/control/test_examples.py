"""What is learned of a record, and where it is predicted."""

from __future__ import annotations

import pytest

import tiny
from trimtab_training.control.examples import PAD_MULTIPLE, ExampleEncoder, View, collate, marked_text
from trimtab_training.control.formats import DataError, Record

CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TURNS = ("user", "Bada?"), ("assistant", "Cefi."), ("user", "Dogu?"), ("assistant", "Fila gomu.")


def conversation(*turns: tuple[str, str]) -> Record:
    return Record("a.jsonl, record 7", tuple({"role": role, "content": content} for role, content in turns))


def encoder(template: str | None = CHAT, *, tokenizer=None, max_length: int = 200) -> ExampleEncoder:
    tokenizer = tokenizer or tiny.byte_level(400)
    tokenizer.chat_template = template
    return ExampleEncoder(tokenizer, max_length)


def learned(view: View, tokenizer) -> str:
    return tokenizer.decode(view.targets)


def test_every_turn_of_the_assistant_is_learned_with_its_end():
    """And nothing else: neither the line break behind the end, nor a turn of the user."""
    tokenizer = tiny.byte_level(400)
    (view,) = encoder(tokenizer=tokenizer).views(conversation(*TURNS))
    assert learned(view, tokenizer) == "Cefi.</s>Fila gomu.</s>"
    assert tokenizer.decode(view.ids) == (
        "<s>user\nBada?</s>\n<s>assistant\nCefi.</s>\n<s>user\nDogu?</s>\n<s>assistant\nFila gomu.</s>"
    )


def test_the_prompt_is_tokenized_as_a_server_does():
    """Alone: a token never reaches from the prompt into the answer."""
    tokenizer = tiny.byte_level(400)
    made = encoder(
        "{{ messages[0]['content'] }} {{ messages[1]['content'] if messages|length > 1 }}",
        tokenizer=tokenizer,
    )
    (view,) = made.views(conversation(("user", "Bada?"), ("assistant", "Cefi.")))
    prompt = view.ids[: view.positions[0]]
    assert list(prompt) == tokenizer("Bada? ", add_special_tokens=False).input_ids
    assert learned(view, tokenizer) == "Cefi.</s>"


def test_a_template_without_an_end_gets_the_eos_token():
    tokenizer = tiny.byte_level(400)
    (view,) = encoder(CHAT.replace("</s>", ""), tokenizer=tokenizer).views(conversation(*TURNS))
    assert learned(view, tokenizer) == "Cefi.Fila gomu.</s>"


def test_a_template_that_renders_history_in_another_way_gives_a_view_for_each_turn():
    """Each as it is when that turn is generated."""
    tokenizer = tiny.byte_level(400)
    first, second = encoder(tiny.CONTROL_TEMPLATE, tokenizer=tokenizer).views(conversation(*TURNS))
    assert tokenizer.decode(first.ids) == "user says Bada?. Then:Cefi.</s>"
    assert learned(first, tokenizer) == "Cefi.</s>"
    assert learned(second, tokenizer) == "Fila gomu.</s>"


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.metaspace, tiny.byte_fallback])
def test_a_completion_follows_its_prompt_byte_by_byte(make):
    """Whichever way the tokenizer treats the spaces between them."""
    tokenizer = make(420)
    for prompt, completion in (("Bada ", "cefi."), ("Bada", " cefi."), ("Ba", "da")):
        (view,) = encoder(tokenizer=tokenizer).views(Record("r", None, prompt, completion))
        start = view.positions[0]
        whole = tokenizer.decode(view.ids, skip_special_tokens=True).strip()
        assert whole == (prompt + completion).strip()
        assert list(view.ids[:start]) == tokenizer(prompt).input_ids
        assert view.ids[-1] == tokenizer.eos_token_id
        assert view.positions == tuple(range(start, len(view.ids)))


def test_the_first_token_of_a_text_without_a_beginning_is_not_learned():
    """Nothing comes before it, from which it could be predicted."""
    tokenizer = tiny.byte_level(400)
    (view,) = encoder(tokenizer=tokenizer).views(Record("r", None, "", "Bada cefi."))
    assert view.positions == tuple(range(1, len(view.ids)))


def test_a_batch_says_where_each_answer_token_is_predicted():
    """From the token before it; nothing sees the padding on the right."""
    batch = collate([View((1, 2, 3, 4), (2, 3)), View((5, 6), (1,))], 0)
    assert batch.ids.shape == (2, PAD_MULTIPLE)
    assert batch.ids[:, :5].tolist() == [[1, 2, 3, 4, 0], [5, 6, 0, 0, 0]]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0)]


def test_the_masked_example_has_what_is_learned_in_brackets():
    tokenizer = tiny.byte_level(400)
    view = View((3, 4, tokenizer.eos_token_id), (1, 2))
    assert marked_text(view, tokenizer) == f"{tokenizer.decode([3])}[{tokenizer.decode([4])}][</s>]"


def test_an_answer_is_cut_at_the_maximum_length():
    made = encoder(max_length=30)
    (view,) = made.views(conversation(("user", "Bada?"), ("assistant", "Cefi dogu " * 20)))
    assert len(view.ids) == 30
    assert view.positions[-1] == 29
    assert made.shortened == 1


def test_a_prompt_longer_than_the_maximum_length_is_refused():
    with pytest.raises(DataError, match=r"record 7: its prompt has \d+ tokens, and `max_length` is 12"):
        encoder(max_length=12).views(conversation(("user", "Bada " * 20), ("assistant", "Cefi.")))


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(DataError, match="record 7 is a conversation, and the tokenizer has no chat template"):
        encoder(None).views(conversation(*TURNS))


def test_what_a_chat_template_refuses_is_named_with_its_record():
    with pytest.raises(DataError, match="record 7: the chat template can't render it: no way"):
        encoder("{{ raise_exception('no way') }}").views(conversation(*TURNS))


def test_a_system_prompt_takes_the_place_of_the_records_own():
    tokenizer = tiny.byte_level(400)
    made = encoder(tokenizer=tokenizer)
    (view,) = made.views(conversation(("system", "gomu"), *TURNS), "fila")
    assert tokenizer.decode(view.ids).startswith("<s>system\nfila</s>\n<s>user\nBada?")
