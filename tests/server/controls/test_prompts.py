"""A chat in the control's own template and tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import tiny
from trimtab_processors.pack import Pack, load_pack
from trimtab_server.controls.prompts import PromptRenderer, extract_messages, load_renderer
from trimtab_server.errors import BadRequestError, PromptTooLongError

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_level(300)


CHAT = "/v1/chat/completions"
LIMIT = 10_000


def encode(renderer, messages, limit=LIMIT, **options):
    return renderer.encode(renderer.render(extract_messages(CHAT, {"messages": messages, **options})), limit)


@pytest.fixture
def render(tokenizer):
    renderer = PromptRenderer(tokenizer, TEMPLATE)

    def render(*messages, **options):
        return tokenizer.decode(encode(renderer, list(messages), **options))

    return render


def user(content):
    return {"role": "user", "content": content}


def test_a_chat_ends_in_the_prompt_for_an_answer(render):
    assert render(user("hi"), user("you")) == "<s>[user]hi</s>[user]you</s>[assistant]"


def test_the_prompt_for_an_answer_can_be_left_out(render):
    assert render(user("hi"), add_generation_prompt=False) == "<s>[user]hi</s>"


def test_the_last_message_can_be_continued(render):
    said = {"role": "assistant", "content": "I am"}
    assert render(user("hi"), said, continue_final_message=True) == "<s>[user]hi</s>[assistant]I am"


def test_text_parts_become_lines_and_images_are_left_out(render):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}, "b"]
    assert render(user(parts), add_generation_prompt=False) == "<s>[user]a\nb</s>"


def test_a_message_without_content_is_empty(render):
    assert render({"role": "assistant"}, add_generation_prompt=False) == "<s>[assistant]</s>"


def test_the_template_writes_the_special_tokens_and_nothing_adds_more(tokenizer):
    ids = encode(PromptRenderer(tokenizer, TEMPLATE), [user("hi")])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("messages", [None, "hi", ["hi"], {"role": "user"}, [user(3)]])
def test_messages_that_are_none_are_refused(messages):
    with pytest.raises(BadRequestError) as caught:
        extract_messages(CHAT, {"messages": messages})
    assert caught.value.param == "messages"


def test_a_template_that_fails_is_the_requests_fault_and_says_why(tokenizer):
    renderer = PromptRenderer(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequestError, match="roles must alternate") as caught:
        encode(renderer, [user("hi")])
    assert caught.value.param == "messages"


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(BadRequestError):
        encode(PromptRenderer(tokenizer, TEMPLATE), [user("\ud800")])


def test_threads_get_what_one_alone_gets(tokenizer):
    renderer = PromptRenderer(tokenizer, TEMPLATE)
    chats = [[user(f"message {i} " * 50)] for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(lambda chat: encode(renderer, chat), chats))
    assert several == [encode(renderer, chat) for chat in chats]


def test_the_tokens_are_those_of_the_tokenizer_itself(tokenizer):
    text = "words, 123 \u0939\U0001f600 <s> " * 20
    assert PromptRenderer(tokenizer, None).encode(text, LIMIT) == tokenizer.encode(
        text, add_special_tokens=False
    )


def test_more_tokens_than_the_limit_are_refused(tokenizer):
    renderer = PromptRenderer(tokenizer, None)
    text = "hello there" * 20
    count = len(renderer.encode(text, LIMIT))
    assert len(renderer.encode(text, count)) == count
    with pytest.raises(PromptTooLongError, match=f"{count} of the control's tokens, more than {count - 1}"):
        renderer.encode(text, count - 1)


def test_a_text_that_no_such_number_of_tokens_can_spell_is_refused_before_it_is_tokenized(tokenizer):
    renderer = PromptRenderer(tokenizer, None)
    renderer._backend = None  # not needed
    longest = max(len(token.encode()) for token in tokenizer.get_vocab())
    with pytest.raises(PromptTooLongError, match=f"{longest * 5 + 1} bytes, more than any 5 tokens"):
        renderer.encode("x" * (longest * 5 + 1), 5)


def test_the_size_of_a_chat_is_that_of_its_texts_without_images():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    chat = extract_messages(CHAT, {"messages": [user([{"type": "text", "text": "look"}, image])]})
    assert chat.text_bytes == 4
    assert chat.size < 100
    called = {"role": "assistant", "tool_calls": [{"function": {"arguments": "x" * 500}}]}
    assert extract_messages(CHAT, {"messages": [called]}).size > 500


def test_the_packs_template_stands_before_the_tokenizers(pack, tmp_path):
    plain = load_pack(str(pack))
    own = plain.model_copy(update={"chat_template": "{{ messages[0].content }}!"})
    assert encode(load_renderer(own), [user("hi")]) != encode(load_renderer(plain), [user("hi")])


def test_a_pack_without_any_template_has_no_prompter(bare_pack):
    assert load_renderer(load_pack(str(bare_pack))) is None


def test_a_pack_is_rendered_by_its_first_component(pack):
    assert (
        load_renderer(Pack(components=({"model": str(pack)}, {"model": "no-such", "weight": -1}))) is not None
    )
