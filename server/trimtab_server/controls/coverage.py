"""What a control does to each field of vLLM's four generating endpoints: the table of code, docs and tests.

An answer that names a control holds no number of the uncontrolled model. `REFUSALS` are the requests that
vLLM would answer with such a number, or whose prompt the target and the control would read differently.
`COVERED` are all other fields. docs/control_coverage.md shows both tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from trimtab_server.controls.prompts import has_conversation
from trimtab_server.controls.registry import ResolvedControls
from trimtab_server.engines.vllm.endpoints import CHAT, COMPLETIONS, GENERATING, MESSAGES, RESPONSES
from trimtab_server.errors import BadRequestError

Body = Mapping[str, Any]
_UNCONTROLLED_PROMPT = "vLLM computes the log-probabilities of a prompt without the control"
_OTHER_PROMPT = "the target would read another prompt than the control, which reads the messages"
_LEAVE_OUT = "Leave it out"
_BUILT_IN_TOOLS = frozenset({"code_interpreter", "container", "mcp", "web_search_preview"})


class Verdict(StrEnum):
    """What a control has to do with a field that is passed on."""

    CONTROLLED = "controlled"
    UNTOUCHED = "not touched"


@dataclass(frozen=True)
class Refusal:
    """A request that the gateway refuses if it names a control."""

    field: str
    endpoints: tuple[str, ...]
    applies: Callable[[Body], bool]
    reason: str
    when: str = ""
    """Which uses of the field are refused; empty: each."""
    advice: str = _LEAVE_OUT
    own_prompt: bool = False
    """Whether only controls that read the messages in their own template are concerned."""

    def message(self, body: Body) -> str:
        """Return what the client is told."""
        named = f"`{self.field}` {self.when}".rstrip()
        given = json.dumps(body.get(self.field))[:40]
        advice = f"{self.advice}, or send `control: false`."
        return f"{named} can't be used under a control, got {given}: {self.reason}. {advice}"


@dataclass(frozen=True)
class Covered:
    """Fields that are passed on under a control."""

    fields: tuple[str, ...]
    verdict: Verdict
    reason: str
    endpoints: tuple[str, ...] = GENERATING


def refuse_uncontrolled(path: str, body: Body, choices: ResolvedControls) -> None:
    """Refuse a request under a control that vLLM would answer with numbers of the uncontrolled model.

    Raises:
        BadRequestError: `param` is the field.
    """
    if not choices:
        return
    own_prompt = has_conversation(path, body) and any(choice.control.renderer for choice in choices)
    for refusal in REFUSALS:
        if path in refusal.endpoints and (own_prompt or not refusal.own_prompt) and refusal.applies(body):
            raise BadRequestError(refusal.message(body), param=refusal.field)


def _given(field: str) -> Callable[[Body], bool]:
    return lambda body: body.get(field) is not None


def _is_on(field: str) -> Callable[[Body], bool]:
    return lambda body: bool(body.get(field))


def _holds(field: str, *keys: str) -> Callable[[Body], bool]:
    def applies(body: Body) -> bool:
        value = body.get(field)
        return isinstance(value, dict) and any(value.get(key) not in (None, False) for key in keys)

    return applies


def _echoes_logprobs(body: Body) -> bool:
    return bool(body.get("echo")) and body.get("logprobs") is not None


def _is_cut(body: Body) -> bool:
    # vLLM cuts for an explicit null, too
    return bool(body.get("truncation", "disabled") != "disabled")


def _calls_built_in_tools(body: Body) -> bool:
    tools = body.get("tools")
    kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return any(isinstance(kind, str) and kind in _BUILT_IN_TOOLS for kind in kinds)


REFUSALS = (
    Refusal(
        *("use_beam_search", (CHAT, COMPLETIONS), _is_on("use_beam_search")),
        reason="vLLM's beam search does not call logits processors",
    ),
    Refusal(
        *("prompt_logprobs", (CHAT, COMPLETIONS), _given("prompt_logprobs")),
        reason=_UNCONTROLLED_PROMPT,
    ),
    Refusal(
        *("echo", (COMPLETIONS,), _echoes_logprobs),
        when="with `logprobs`",
        reason=_UNCONTROLLED_PROMPT,
        advice="Leave out one of them",
    ),
    Refusal(
        *("echo", (CHAT,), _is_on("echo")),
        reason=f"it asks for `prompt_logprobs` on a chat, and {_UNCONTROLLED_PROMPT}",
    ),
    Refusal(
        *("prompt_embeds", (COMPLETIONS,), _given("prompt_embeds")),
        reason="a control can't read embeddings",
        advice="Send `prompt`",
    ),
    Refusal(
        *("truncate_prompt_tokens", (CHAT,), _given("truncate_prompt_tokens")),
        reason=_OTHER_PROMPT,
        advice="Leave it out and shorten the messages",
        own_prompt=True,
    ),
    Refusal(
        *("truncation", (RESPONSES,), _is_cut),
        when="other than `disabled`",
        reason=_OTHER_PROMPT,
        advice="Leave it out and shorten the input",
        own_prompt=True,
    ),
    Refusal(
        *("chat_template_kwargs", (CHAT, RESPONSES, MESSAGES)),
        _holds("chat_template_kwargs", "truncation", "max_length"),
        when="with `truncation` or `max_length`",
        reason=_OTHER_PROMPT,
        advice="Leave them out and shorten the messages",
        own_prompt=True,
    ),
    Refusal(
        *("kv_transfer_params", (CHAT, RESPONSES, MESSAGES)),
        _holds("kv_transfer_params", "prompt_token_ids"),
        when="with `prompt_token_ids`",
        reason=_OTHER_PROMPT,
        advice="Leave the ids out",
        own_prompt=True,
    ),
    Refusal(
        *("tools", (RESPONSES,), _calls_built_in_tools),
        when=f"of type {', '.join(f'`{kind}`' for kind in sorted(_BUILT_IN_TOOLS))}",
        reason="vLLM calls such a tool and continues with its result, which the control does not read",
        advice="Use tools of type `function`",
        own_prompt=True,
    ),
    Refusal(
        *("background", (RESPONSES,), _is_on("background")),
        reason="vLLM would generate after the answer, and the control could be unloaded before",
        advice="Send `stream: true` instead",
    ),
)


def _row(fields: str, verdict: Verdict, reason: str, *endpoints: str) -> Covered:
    return Covered(tuple(fields.split()), verdict, reason, endpoints or GENERATING)


_CONTROLLED, _UNTOUCHED = Verdict.CONTROLLED, Verdict.UNTOUCHED
COVERED = (
    _row(
        "messages input instructions system",
        _CONTROLLED,
        "The control reads the text in its own chat template. Without one it reads the text of the target's"
        " prompt. The target alone reads images, audio, embeddings and tool calls.",
        *(CHAT, RESPONSES, MESSAGES),
    ),
    _row(
        "prompt suffix add_special_tokens truncate_prompt_tokens truncation_side",
        _CONTROLLED,
        "The control reads the text of the target's prompt, as vLLM cut it. Each of several prompts has a"
        " context of its own.",
        COMPLETIONS,
    ),
    _row(
        "previous_response_id previous_input_messages",
        _CONTROLLED,
        "The control reads the text of the target's prompt.",
        RESPONSES,
    ),
    _row(
        "add_generation_prompt continue_final_message",
        _CONTROLLED,
        "The control's prompt ends as the target's.",
        CHAT,
    ),
    _row(
        "add_special_tokens chat_template chat_template_kwargs documents media_io_kwargs mm_processor_kwargs"
        " output_config parallel_tool_calls reasoning reasoning_effort thinking tools truncation_side",
        _CONTROLLED,
        "The target alone reads them. The text is generated under the control.",
        *(CHAT, RESPONSES, MESSAGES),
    ),
    _row(
        "allowed_token_ids bad_words logit_bias min_tokens response_format structured_outputs text"
        " thinking_token_budget tool_choice",
        _CONTROLLED,
        "A token that they exclude stays excluded. The control shifts the others.",
    ),
    _row(
        "frequency_penalty min_p n presence_penalty repetition_penalty seed temperature top_k top_p"
        " watermarking",
        _CONTROLLED,
        "vLLM samples from the shifted logits, for each of `n` choices.",
    ),
    _row(
        "include logprob_token_ids logprobs top_logprobs return_tokens_as_token_ids",
        _CONTROLLED,
        "The log-probabilities of generated tokens are those of the distribution that vLLM sampled them from."
        " The plugin refuses them if the server's `--logprobs-mode` is `raw_logprobs` or `raw_logits`.",
    ),
    _row(
        "ignore_eos include_stop_str_in_output max_completion_tokens max_output_tokens max_tokens"
        " max_tool_calls repetition_detection stop stop_sequences stop_token_ids",
        _UNTOUCHED,
        "They end the text.",
    ),
    _row(
        "include_reasoning skip_special_tokens spaces_between_special_tokens stream stream_interval"
        " stream_options",
        _UNTOUCHED,
        "They select which parts of the answer come back, and in which pieces.",
    ),
    _row(
        "enable_response_messages return_prompt_text return_token_ids routed_experts_prompt_start",
        _UNTOUCHED,
        "They return token ids, texts, and the target's choice of experts, but no probability.",
    ),
    _row("echo", _UNTOUCHED, "It returns the text of the prompt.", COMPLETIONS),
    _row(
        "cache_salt ec_transfer_params kv_transfer_params priority prompt_cache_key store",
        _UNTOUCHED,
        "They decide when a request runs, and where caches and responses are kept.",
    ),
    _row(
        "metadata model request_id service_tier session_id user vllm_xargs",
        _UNTOUCHED,
        "They name things. The gateway refuses keys of `vllm_xargs` that begin with `trimtab_`, with and"
        " without a control.",
    ),
    _row(
        "length_penalty mm_payload return_mm_kwargs return_token_offsets",
        _UNTOUCHED,
        "vLLM does not use them on these endpoints, except for beam search.",
    ),
    _row("prompt", _UNTOUCHED, "vLLM itself refuses it.", RESPONSES),
)
