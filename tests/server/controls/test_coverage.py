"""Under a control no answer has a number of the uncontrolled model: the table of fields, code and docs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import product
from operator import attrgetter
from pathlib import Path

import pytest

from trimtab_processors.parameters import parse_xargs
from trimtab_server.controls.coverage import COVERED, REFUSALS, Refusal
from trimtab_server.controls.prompts import extract_messages
from trimtab_server.engines.vllm.endpoints import CHAT, COMPLETIONS, GENERATING, MESSAGES, RESPONSES
from vllm_requests import REQUESTS, ResponsesRequest, should_continue_final_message

PAGE = (Path(__file__).parents[3] / "docs" / "control_coverage.md").read_text(encoding="utf-8")
HELLO = [{"role": "user", "content": "Hello"}]
PLAIN = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "Hello"},
    RESPONSES: {"input": "Hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 1},
}
REFUSED = {
    "use_beam_search": [{"use_beam_search": True}],
    "prompt_logprobs": [{"prompt_logprobs": count} for count in (5, 0, -1, False)],
    "echo": [{"echo": True, "logprobs": count} for count in (5, 0, True)],
    "prompt_embeds": [{"prompt_embeds": "AAAA"}, {"prompt_embeds": ["AAAA"]}],
    "truncate_prompt_tokens": [{"truncate_prompt_tokens": count} for count in (5, 0, -1)],
    "truncation": [{"truncation": "auto"}, {"truncation": None}],
    "chat_template_kwargs": [
        {"chat_template_kwargs": {"truncation": True}},
        {"chat_template_kwargs": {"max_length": 5}},
    ],
    "kv_transfer_params": [{"kv_transfer_params": {"prompt_token_ids": [1]}}],
    "tools": [{"tools": [{"type": "function", "name": "f"}, {"type": "mcp", "server_label": "s"}]}],
    "background": [{"background": True}],
}
"""By field: what is refused under a control."""
PASSED = {
    "use_beam_search": [{"use_beam_search": False}],
    "prompt_logprobs": [{"prompt_logprobs": None}],
    "echo": [{"echo": False, "logprobs": 5}],
    "prompt_embeds": [{"prompt_embeds": None}],
    "truncate_prompt_tokens": [{"truncate_prompt_tokens": None}, {"truncation_side": "left"}],
    "truncation": [{"truncation": "disabled"}],
    "chat_template_kwargs": [{"chat_template_kwargs": {"enable_thinking": True}}],
    "kv_transfer_params": [{"kv_transfer_params": {"do_remote_decode": True}}],
    "tools": [{"tools": [{"type": "function", "name": "f"}]}, {"tools": []}],
    "background": [{"background": False}],
}
"""By field: what is answered under a control all the same."""


each_refusal = pytest.mark.parametrize(
    "refusal", REFUSALS, ids=lambda each: f"{each.field}{len(each.endpoints)}"
)


def cases(refusal: Refusal, bodies: dict[str, list[dict]]) -> Iterator[tuple[str, dict]]:
    """Each endpoint with each body of the refusal's field."""
    return product(refusal.endpoints, bodies[refusal.field])


@pytest.fixture
def gateway(start, pack, bare_pack):
    """A model with a control that has a chat template, and one that has none."""
    return start(controls={"one": str(pack), "bare": str(bare_pack)})


def ask(gateway, path: str, body: dict, **more):
    asked = {"model": "m", **PLAIN[path], **body, **more}
    return gateway.post(json.dumps(asked), path)


@each_refusal
def test_what_the_control_would_not_reach_is_refused_under_it(gateway, refusal):
    """With the field, what it said, and what to do."""
    for path, body in cases(refusal, REFUSED):
        response = ask(gateway, path, body, control="one")
        error, given = response.json()["error"], (PLAIN[path] | body)[refusal.field]
        assert response.status_code == 400
        assert path == MESSAGES or error["param"] == refusal.field
        assert error["message"].startswith(f"`{refusal.field}` {refusal.when}".rstrip())
        assert f"got {json.dumps(given)[:40]}: {refusal.reason}. " in error["message"]
        assert error["message"].endswith(f"{refusal.advice}, or send `control: false`.")
    assert not gateway.asked("m")


@each_refusal
def test_without_a_control_it_passes(gateway, refusal):
    for path, body in cases(refusal, REFUSED):
        response = ask(gateway, path, body)
        assert (response.status_code, response.headers["x-trimtab-control"]) == (200, "off")
        assert gateway.last("m") == {"model": "m", **PLAIN[path], **body}


@each_refusal
def test_what_the_control_does_reach_passes_under_it(gateway, refusal):
    for path, body in cases(refusal, PASSED):
        response = ask(gateway, path, body, control="one")
        assert (response.status_code, response.headers["x-trimtab-control"]) == (200, "one=0.5")


@pytest.mark.parametrize("body", [{"echo": True}, {"truncate_prompt_tokens": 5}])
def test_a_completion_may_echo_its_text_and_be_cut(gateway, body):
    """The control reads the text of the target's prompt, cut as it is."""
    assert ask(gateway, COMPLETIONS, body, control="one").status_code == 200


@pytest.mark.parametrize(
    "refusal", [refusal for refusal in REFUSALS if refusal.own_prompt], ids=attrgetter("field")
)
def test_a_prompt_may_be_cut_if_the_control_reads_the_targets(gateway, refusal):
    """As a control without a template does; of two, both have to."""
    for path, body in cases(refusal, REFUSED):
        assert ask(gateway, path, body, control="bare").status_code == 200
        assert ask(gateway, path, body, control=["bare", "one"]).status_code == 400


@pytest.mark.parametrize("earlier", [{"previous_response_id": "r"}, {"previous_input_messages": [{}]}])
def test_a_response_may_be_cut_whose_conversation_is_not_all_in_the_body(gateway, earlier):
    """The control reads the target's prompt."""
    response = ask(gateway, RESPONSES, {"truncation": "auto", **earlier}, control="one")
    assert response.status_code == 200
    (parameters,) = parse_xargs(gateway.last("m")["vllm_xargs"])
    assert parameters.prompt is None


@pytest.mark.parametrize("items", [0, "", [None], {"a": 1}, [[]], [{"type": []}]])
def test_what_is_malformed_is_not_the_tables_business(items):
    body = dict.fromkeys(("tools", "kv_transfer_params", "chat_template_kwargs"), items)
    assert not [refusal.field for refusal in REFUSALS if refusal.applies(body)]


@pytest.mark.parametrize("path", GENERATING)
def test_the_table_has_each_field_of_vllms_request_once(path):
    """A field that a new vLLM has fails here, until somebody decides what a control does to it."""
    refused = {refusal.field for refusal in REFUSALS if path in refusal.endpoints}
    covered = [field for row in COVERED if path in row.endpoints for field in row.fields]
    known = {*covered, *refused}
    assert set(REQUESTS[path].model_fields) - known == set()
    of_vllm = [field for field in covered if field in REQUESTS[path].model_fields]
    assert sorted(of_vllm) == sorted(set(of_vllm))
    assert refused <= set(REQUESTS[path].model_fields)


def test_the_table_has_no_field_that_vllm_has_not():
    for row in COVERED:
        for field in row.fields:
            assert any(field in REQUESTS[path].model_fields for path in row.endpoints), field


def test_the_page_shows_the_table_row_by_row():
    shown = [line for line in PAGE.partition("## Answers")[0].splitlines() if line.startswith("| `")]
    assert shown == [*map(refused_row, REFUSALS), *map(covered_row, COVERED)]


def refused_row(refusal: Refusal) -> str:
    when = " ".join([f"`{refusal.field}`", refusal.when]).strip()
    only = "; only if a control has a chat template" if refusal.own_prompt else ""
    return f"| {when} | {named(refusal.endpoints)} | {refusal.reason}{only} | {refusal.advice} |"


def covered_row(row) -> str:
    fields = ", ".join(f"`{field}`" for field in row.fields)
    having = [path for path in row.endpoints if {*row.fields} & {*REQUESTS[path].model_fields}]
    return f"| {fields} | {named(having)} | {row.verdict} | {row.reason} |"


def named(paths) -> str:
    short = {CHAT: "chat", COMPLETIONS: "completions", RESPONSES: "responses", MESSAGES: "messages"}
    return "all" if len(paths) == len(short) else ", ".join(short[path] for path in paths)


@pytest.mark.parametrize("kind", [{"type": "message"}, {}])
@pytest.mark.parametrize(
    "status", [{"status": "in_progress"}, {"status": "incomplete"}, {"status": "completed"}, {}]
)
@pytest.mark.parametrize("content", ["I am", [{"type": "input_text", "text": "I am"}]])
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_the_controls_prompt_ends_as_that_of_vllms_response(kind, status, content, role):
    """Both continue a last message that is not complete, or neither does."""
    ends_as_vllms({"role": role, "content": content, **kind, **status})


@pytest.mark.parametrize("status", ["in_progress", "completed"])
def test_the_controls_prompt_ends_as_that_of_vllms_after_a_call(status):
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}
    ends_as_vllms({**call, "status": status})
    ends_as_vllms({"type": "message", "role": "assistant", "content": [SAID], "status": status})


SAID = {"type": "output_text", "text": "I am"}


def ends_as_vllms(last: dict) -> None:
    request = ResponsesRequest.model_validate({"model": "m", "input": copy.deepcopy([*HELLO, last])})
    chat = extract_messages(RESPONSES, {"input": [*HELLO, last]})
    assert chat.continue_final_message == should_continue_final_message(request.input)
