"""A chat in the control's own template and tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import tiny
from trimtab_processors.pack import Pack, load_pack
from trimtab_server.errors import BadRequestError
from trimtab_server.prompts import Prompter, load_prompter

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_level(300)


@pytest.fixture
def render(tokenizer):
    prompter = Prompter(tokenizer, TEMPLATE)

    def render(*messages, **options):
        return tokenizer.decode(prompter.encode({"messages": list(messages), **options}))

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
    ids = Prompter(tokenizer, TEMPLATE).encode({"messages": [user("hi")]})
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("messages", [None, "hi", ["hi"], {"role": "user"}, [user(3)]])
def test_messages_that_are_none_are_refused(tokenizer, messages):
    with pytest.raises(BadRequestError) as caught:
        Prompter(tokenizer, TEMPLATE).encode({"messages": messages})
    assert caught.value.param == "messages"


def test_a_template_that_fails_is_the_requests_fault_and_says_why(tokenizer):
    prompter = Prompter(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequestError, match="roles must alternate") as caught:
        prompter.encode({"messages": [user("hi")]})
    assert caught.value.param == "messages"


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(BadRequestError):
        Prompter(tokenizer, TEMPLATE).encode({"messages": [user("\ud800")]})


def test_threads_get_what_one_alone_gets(tokenizer):
    prompter = Prompter(tokenizer, TEMPLATE)
    bodies = [{"messages": [user(f"message {i} " * 50)]} for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(prompter.encode, bodies)) == [prompter.encode(body) for body in bodies]


def test_the_packs_template_stands_before_the_tokenizers(pack, tmp_path):
    plain = load_pack(str(pack))
    own = plain.model_copy(update={"chat_template": "{{ messages[0].content }}!"})
    body = {"messages": [user("hi")]}
    assert load_prompter(own).encode(body) != load_prompter(plain).encode(body)


def test_a_pack_without_any_template_has_no_prompter(bare_pack):
    assert load_prompter(load_pack(str(bare_pack))) is None


def test_a_pack_is_rendered_by_its_first_component(pack):
    assert (
        load_prompter(Pack(components=({"model": str(pack)}, {"model": "no-such", "weight": -1}))) is not None
    )
