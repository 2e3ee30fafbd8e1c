"""Bodies of any size and shape: what is read of them, and how little that costs."""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_server.api.byte_budget import ByteBudget
from trimtab_server.api.json_body import MAX_ITEMS, JsonObject, parse_object
from trimtab_server.errors import BadRequestError, BodyTooLargeError
from trimtab_server.protocol import SMALL_BODY_BYTES

TEXTS = st.text(max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)


@given(OBJECTS, st.booleans())
def test_it_reads_what_python_reads(value, ascii_only):
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert dict(parse_object(body)) == value


@given(OBJECTS, TEXTS, VALUES)
def test_a_change_leaves_every_other_value_as_it_was_written(value, name, new):
    body = json.dumps(value, indent=1).encode()
    changed = parse_object(body)
    changed[name] = new
    assert json.loads(changed.encode()) == {**value, name: new}
    del changed[name]
    assert json.loads(changed.encode()) == {key: kept for key, kept in value.items() if key != name}


def test_without_a_change_the_bytes_are_the_clients():
    body = b'{"a" : 1.0e5,\n "a": [ 1234567890123456789012345678901234567890 ]}'
    assert parse_object(body).encode() is body


def test_numbers_keep_their_digits_and_their_form():
    changed = parse_object(b'{"big": 1e400, "exact": 1.10, "model": "a:b"}')
    changed["model"] = "a"
    assert changed.encode() == b'{"big":1e400,"exact":1.10,"model":"a"}'


def test_the_last_of_two_equal_names_counts():
    assert parse_object(b'{"a": 1, "a": 2}')["a"] == json.loads('{"a": 1, "a": 2}')["a"] == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (rb'{"a": ["\ud800"]}', "half of a surrogate pair"),
        (rb'{"a": "\ud83d\\\ude00"}', "half of a surrogate pair"),
        (b'{"a": ["\xff"]}', "invalid start byte"),
        (b'{"a": [NaN]}', "NaN is no number in JSON"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": 1} {}', "Extra data"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"a": 1, "b": "' + b"x" * SMALL_BODY_BYTES, "truncated"),
    ],
)
def test_what_is_no_json_is_refused_with_a_reason(body, said):
    with pytest.raises(BadRequestError, match="The body is not valid JSON") as caught:
        parse_object(body)
    assert said in str(caught.value)
    assert caught.value.code == "invalid_json"


def test_surrogates_that_are_a_pair_are_a_character():
    assert parse_object(rb'{"a": "\ud83d\ude00"}')["a"] == "\N{GRINNING FACE}"


MEGABYTES = 28_000_000
LARGE = {
    "text": b'{"prompt": "' + b"word " * (MEGABYTES // 5) + b'"}',
    "escapes": b'{"prompt": "' + rb"\n" * (MEGABYTES // 2) + b'"}',
    "other scripts": b'{"prompt": "' + "\u0939\U0001f600".encode() * (MEGABYTES // 7) + b'"}',
    "lists": b'{"messages": [' + b"[]," * (MEGABYTES // 3) + b"[]]}",
    "objects": b'{"messages": [' + b'{"a":1},' * (MEGABYTES // 8) + b"{}]}",
    "numbers": b'{"prompt": [' + b"1," * (MEGABYTES // 2) + b"1]}",
    "unknown": b'{"of a plugin": {"a": [' + b"1.5e3," * (MEGABYTES // 6) + b"1]}}",
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_body_is_parsed_without_an_object_for_what_is_in_it(kind):
    tracemalloc.start()
    parsed = parse_object(LARGE[kind])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(parsed) == 1
    # Python decodes the text once, to see that it is UTF-8; objects take up to twenty times its bytes.
    assert peak < 7 * len(LARGE[kind])


@pytest.mark.parametrize("kind", ["lists", "objects", "numbers"])
def test_a_value_with_a_million_values_in_it_is_not_decoded(kind):
    parsed = parse_object(LARGE[kind])
    with pytest.raises(BodyTooLargeError, match=f"has more than {MAX_ITEMS} commas") as caught:
        list(parsed.values())
    assert caught.value.param in parsed


@pytest.mark.parametrize("name", ["model", "control", "vllm_xargs"])
def test_what_has_no_reason_to_be_large_is_not_decoded_if_it_is(name):
    parsed = parse_object(json.dumps({name: {"a": [[1.5]] * 20_000}}).encode())
    with pytest.raises(BodyTooLargeError, match=f"`{name}` has 1.* bytes, more than 65536"):
        parsed.get(name)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 990 + "]" * 990])
def test_what_python_can_not_read_is_the_requests_fault(value):
    with pytest.raises(BadRequestError) as caught:
        dict(parse_object(f'{{"model": {value}}}'.encode()))
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("name", ["text_2", "queries", "texts", "generate_response"])
def test_colons_within_the_texts_of_other_endpoints_are_no_fields(name):
    body = json.dumps({"model": "m", name: ["12:00:00 ok: done"] * 20_000}).encode()
    assert set(parse_object(body)) == {"model", name}


def test_a_long_text_is_decoded_whatever_is_in_it():
    text = "a [list], of {things}: " * 20_000
    assert parse_object(json.dumps({"prompt": text}).encode())["prompt"] == text


def test_a_million_fields_are_refused_before_their_names_are_made():
    fields = b",".join(b'"k%d":1' % i for i in range(500_000))
    with pytest.raises(BodyTooLargeError, match="outside of the fields"):
        parse_object(b"{" + fields + b"}")
    with pytest.raises(BodyTooLargeError, match="outside of the fields"):
        parse_object(b"{" + b",".join([b'"model":1'] * 500_000) + b"}")


def test_colons_within_a_prompt_are_no_fields():
    body = json.dumps({"model": "a", "prompt": "a: b " * 100_000}).encode()
    assert set(parse_object(body)) == {"model", "prompt"}


def test_a_field_is_decoded_only_when_it_is_read():
    parsed = parse_object(b'{"a": 1, "b": 2}')
    assert isinstance(parsed, JsonObject)
    assert "a" in parsed
    assert parsed.get("c") is None
    assert parsed.pop("a") == 1
    assert parsed.encode() == b'{"b":2}'


# The room that bodies take.


async def _settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_bytes_are_granted_in_the_order_in_which_they_were_asked_for():
    async def scenario() -> None:
        budget = ByteBudget(10)
        first = await budget.reserve(6)
        large, small = (asyncio.ensure_future(budget.reserve(n)) for n in (8, 1))
        await _settled()
        assert not large.done()
        assert not small.done()  # there would be room, but it came later
        first.release()
        await _settled()
        assert large.done()
        assert small.done()
        (await large).release()
        (await small).release()
        (await small).release()
        assert budget.left == 10

    asyncio.run(scenario())


def test_who_gives_up_waiting_lets_the_next_one_go_on():
    async def scenario() -> None:
        budget = ByteBudget(10)
        first = await budget.reserve(6)
        large, small = (asyncio.ensure_future(budget.reserve(n)) for n in (8, 4))
        await _settled()
        large.cancel()
        await _settled()
        assert small.done()
        first.release()
        (await small).release()
        assert budget.left == 10

    asyncio.run(scenario())


def test_who_is_cancelled_just_before_bytes_are_given_back_holds_up_nobody():
    async def scenario() -> None:
        budget = ByteBudget(10)
        first = await budget.reserve(10)
        gone, next_one = (asyncio.ensure_future(budget.reserve(n)) for n in (7, 5))
        await _settled()
        gone.cancel()
        first.release()
        await _settled()
        assert gone.cancelled()
        (await next_one).release()
        assert budget.left == 10

    asyncio.run(scenario())


def test_who_is_cancelled_in_the_moment_of_the_grant_gives_it_back():
    async def scenario() -> None:
        budget = ByteBudget(10)
        first = await budget.reserve(10)
        waiting = asyncio.ensure_future(budget.reserve(7))
        await _settled()
        first.release()
        waiting.cancel()
        await _settled()
        assert waiting.cancelled()
        assert budget.left == 10

    asyncio.run(scenario())


def test_a_reservation_shrinks_to_what_was_read():
    async def scenario() -> None:
        budget = ByteBudget(10)
        reservation = await budget.reserve(10)
        reservation.shrink(3)
        assert budget.left == 7
        reservation.release()
        assert budget.left == 10

    asyncio.run(scenario())
