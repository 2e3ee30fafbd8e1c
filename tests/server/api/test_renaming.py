"""An answer to an alias names the alias: nothing else in it changes, whatever a model writes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab_server.api.renaming import TOP, EventRenaming, Renaming, event_paths, rename

BASE, ASKED = "a", "a:one=0.7"
TEXTS = st.one_of(
    st.sampled_from(
        [
            '"model":"a"',
            '{"model": "a"}',
            '\\"model\\":\\"a\\"',
            "model",
            "a",
            "response",
            "message",
            'data: {"model":"a"}\n\n',
            "\\",
            '\\"',
            '"',
            "}]}",
            "\u2028\x85\r\n",
            "x" * 200 + '"model":"a"',
        ]
    ),
    st.text(),
)
NAMES = st.one_of(st.sampled_from(["model", "response", "message", "id", "mod\\el"]), TEXTS)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=5)
FORMS = st.sampled_from(
    [
        {"ensure_ascii": True},
        {"ensure_ascii": False},
        {"separators": (",", ":")},
        {"separators": (" ,\t", " : ")},
    ]
)


def expected(value, paths, at=()):
    """The slow reference: what the parsed document is to be."""
    if at in paths:
        return ASKED if value == BASE else value
    if isinstance(value, dict):
        return {key: expected(item, paths, (*at, key)) for key, item in value.items()}
    return value


def cut(data, whole: bytes) -> list[bytes]:
    """`whole` in pieces of any sizes."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def write(document, form) -> str:
    return json.dumps(document, **form)


def dump(document, form) -> bytes:
    return write(document, form).encode(errors="surrogatepass")


@given(document=DOCUMENTS, form=FORMS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_document_in_any_pieces_has_the_new_name_and_is_else_the_same(document, form, data):
    whole = dump(document, form)
    renaming = Renaming(BASE, ASKED, (TOP,))
    answer = b"".join([*map(renaming.feed, cut(data, whole)), renaming.end()])
    assert answer == dump(expected(document, {TOP}), form)
    assert rename(whole, BASE, ASKED) == answer


@given(documents=st.lists(DOCUMENTS, max_size=4), form=FORMS, data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_stream_in_any_pieces_has_the_new_name_and_is_else_the_same(
    endpoint, ending, documents, form, data
):
    paths = event_paths(endpoint)

    def stream(documents) -> bytes:
        lines = [': "comment {', 'event: {"model":"a"}', ""]
        for document in documents:
            lines += ["event: x", f"data: {write(document, form)}", 'id: "', ""]
        return ending.join([*lines, "data: [DONE]", "", ""]).encode(errors="surrogatepass")

    renaming = EventRenaming(BASE, ASKED, paths)
    pieces = [*map(renaming.feed, cut(data, stream(documents))), renaming.end()]
    assert b"".join(pieces) == stream([expected(document, paths) for document in documents])


@given(data=st.data(), whole=st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_what_is_no_json_passes(data, whole):
    """No byte is lost or doubled, whatever comes."""
    for renaming in (Renaming("never", ASKED), EventRenaming("never", ASKED, event_paths("/v1/messages"))):
        assert b"".join([*map(renaming.feed, cut(data, whole)), renaming.end()]) == whole


@pytest.mark.parametrize(
    ("endpoint", "document"),
    [
        ("/v1/responses", {"response": {"model": "a", "output": [{"model": "a"}]}, "type": "x"}),
        ("/v1/messages", {"type": "message_start", "message": {"model": "a", "content": {"model": "a"}}}),
        ("/v1/chat/completions", {"model": "a", "choices": [{"model": "a"}], "response": {"model": "a"}}),
    ],
)
def test_only_the_endpoints_own_place_changes(endpoint, document):
    (place,) = [key for key in ("response", "message") if key in endpoint + "s" and key in document] or [None]
    event = f"data: {json.dumps(document)}\n\n".encode()
    answer = EventRenaming(BASE, ASKED, event_paths(endpoint)).feed(event)
    changed = json.loads(answer.removeprefix(b"data: "))
    named = changed if place is None else changed[place]
    assert named["model"] == ASKED
    assert answer.count(ASKED.encode()) == 1


def test_an_escaped_key_and_an_escaped_name_are_those():
    assert rename(rb'{"\u006dodel": "\u0061"}', BASE, ASKED) == rb'{"\u006dodel": "a:one=0.7"}'


@pytest.mark.parametrize(
    "document",
    ['{"model":"b"}', '{"model": null, "a": 1}', '{"model":12,"a":"a"}', '{"model":{"a":"a"},"x":"a"}'],
)
@pytest.mark.parametrize("size", [1, 7, 99])
def test_another_model_or_none_keeps_its_name(document, size):
    renaming = Renaming(BASE, ASKED)
    pieces = [document.encode()[start : start + size] for start in range(0, len(document), size)]
    assert b"".join([*map(renaming.feed, pieces), renaming.end()]) == document.encode()


def test_no_more_than_a_short_string_is_held_back():
    """What a model writes is passed on at once, however long the event."""
    renaming = Renaming(BASE, ASKED, event_paths("/v1/responses"))
    for piece in (b'{"delta": "' + b"x" * 100, b"y" * 10_000, b'z", "response": {"model": '):
        assert renaming.feed(piece) == piece
    assert renaming.feed(b'"a"}') == b'"a:one=0.7"}'


# Through the gateway


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
def test_an_answer_to_an_alias_names_the_alias(two_models, path):
    response = two_models.chat(path=path, model="plain:one=0.7")
    assert response.json()["model"] == "plain:one=0.7"
    assert two_models.last("plain")["model"] == "plain"
    assert int(response.headers["content-length"]) == len(response.content)


def test_every_event_of_a_stream_names_the_alias(two_models):
    response = two_models.chat(model="plain:one", stream=True)
    events = [
        line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: {")
    ]
    assert [json.loads(event)["model"] for event in events] == ["plain:one"] * 3
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_without_an_alias_the_bytes_are_the_workers(two_models, stream):
    controlled = two_models.chat(model="plain", control="one", stream=stream)
    alias = two_models.chat(model="plain:one", stream=stream)
    assert controlled.content.replace(b'"plain"', b'"plain:one"') == alias.content
    assert b"plain:one" not in controlled.content


def test_a_stream_that_breaks_ends_with_its_error_under_an_alias_too(two_models):
    response = two_models.chat(model="plain:one", stream=True, fake={"hang_up": "midway"})
    assert response.text.split("\n\n")[-2].startswith("event: error\ndata: ")


def test_an_alias_keeps_the_answer_from_being_compressed(two_models):
    """What is compressed can't be renamed; everyone else's wish reaches the replica."""
    asked = {"accept-encoding": "gzip"}
    two_models.client.post("/v1/completions", json={"model": "plain:one", "prompt": ""}, headers=asked)
    two_models.client.post("/v1/completions", json={"model": "plain", "prompt": ""}, headers=asked)
    seen = [{name.lower() for name in each["headers"]} for each in two_models.asked("plain")]
    assert ["accept-encoding" in headers for headers in seen] == [False, True]
