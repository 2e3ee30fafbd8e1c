"""A control's own prompt: the messages in its chat template and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from trimtab_mappings import load_tokenizer
from trimtab_server.engines.vllm import endpoints
from trimtab_server.errors import BadRequestError, PromptTooLongError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trimtab_processors.pack import Pack


@dataclass(frozen=True)
class Chat:
    """A conversation as a control's chat template gets it: texts alone, without images and audio."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    param: str = "messages"
    """The field of the body that holds it."""

    @cached_property
    def size(self) -> int:
        """Its bytes as JSON: what rendering and tokenizing it costs grows with them."""
        return len(msgspec.json.encode(self.messages))

    @property
    def text_bytes(self) -> int:
        """The bytes of its texts alone."""
        return sum(len(message["content"].encode()) for message in self.messages)


def has_conversation(path: str, body: Mapping[str, Any]) -> bool:
    """Whether the body holds the whole conversation, which a control then reads in its own template."""
    if path == endpoints.RESPONSES:
        return not (body.get("previous_response_id") or body.get("previous_input_messages"))
    return path in (endpoints.CHAT, endpoints.MESSAGES)


def extract_messages(path: str, body: Mapping[str, Any]) -> Chat | None:
    """Return the conversation of a request.

    Args:
        path: the endpoint.
        body: the request's body.

    Returns:
        None if the endpoint has no conversation, or not all of it is in the body.

    Raises:
        BadRequestError: `messages` or `input` is not a list of objects, or a content is not text or parts.
    """
    if not has_conversation(path, body):
        return None
    match path:
        case endpoints.CHAT:
            continues = bool(body.get("continue_final_message"))
            asks = bool(body.get("add_generation_prompt", not continues))
            return Chat(_messages(body.get("messages"), "messages"), asks, continues)
        case endpoints.MESSAGES:
            turns = [*_system(body.get("system")), *_listed(body.get("messages"), "messages")]
            return Chat(_messages(turns, "messages"))
        case endpoints.RESPONSES:
            given = body.get("input")
            turns = (
                [{"role": "user", "content": given}] if isinstance(given, str) else _listed(given, "input")
            )
            spoken = [turn for turn in turns if not isinstance(turn, dict) or "role" in turn]
            messages = _messages([*_system(body.get("instructions")), *spoken], "input")
            continues = _is_continued(turns)
            return Chat(messages, not continues, continues, "input")
    return None


class PromptRenderer:
    """Renders and tokenizes chats for one control; safe to call from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        # The backend itself: the wrapper's own call changes its truncation, which threads must not share.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._longest_token = max(len(token.encode()) for token in tokenizer.get_vocab())
        """Upper bound on the bytes of a token: byte-level vocabularies write some bytes as two."""

    def render(self, chat: Chat) -> str:
        """Return the text of a chat in the control's template.

        Raises:
            BadRequestError: the template rejects the messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                chat.messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
            )
        except Exception as error:  # a template is data, and fails in any way it likes
            raise _rejected(error, chat.param) from error
        return str(text)

    def encode(self, text: str, limit: int, param: str = "messages") -> list[int]:
        """Return the control's token ids of a rendered chat.

        Args:
            text: what `render` returned.
            limit: upper bound on their number.
            param: the field of the request that an error names.

        Raises:
            PromptTooLongError: there are more. A text that is too long for any `limit` tokens is refused by
                its length, which takes no time.
            BadRequestError: the text is not Unicode.
        """
        try:
            size = len(text.encode())
            if size > limit * self._longest_token:
                raise PromptTooLongError(
                    f"The prompt has {size} bytes, more than any {limit} tokens of the control"
                    " (limits.control_prompt_tokens).",
                    param=param,
                )
            # A batch of one: unlike a single text, it is encoded without Python's global lock, so that other
            # requests go on meanwhile. The fast way leaves out where each token is, half of the work.
            ids = list(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        except (UnicodeError, TypeError) as error:
            raise _rejected(error, param) from error
        if len(ids) > limit:
            raise PromptTooLongError(
                f"The prompt has {len(ids)} of the control's tokens, more than {limit}"
                " (limits.control_prompt_tokens).",
                param=param,
            )
        return ids


def load_renderer(pack: Pack) -> PromptRenderer | None:
    """The renderer of a pack, with its first component's tokenizer; None where there is no chat template.

    Raises:
        trimtab_mappings.vocabulary.VocabularyError: there is no tokenizer to load.
    """
    tokenizer = load_tokenizer(pack.components[0].model)
    if pack.chat_template is None and tokenizer.chat_template is None:
        return None
    return PromptRenderer(tokenizer, pack.chat_template)


def _rejected(error: Exception, param: str) -> BadRequestError:
    message = f"The control's chat template can't render these messages: {error}"
    return BadRequestError(message, param=param)


def _system(content: Any) -> list[dict[str, Any]]:
    return [] if content is None else [{"role": "system", "content": content}]


def _is_continued(turns: Sequence[Any]) -> bool:
    """Whether vLLM continues the last turn of a response's input, because it is not complete."""
    last = turns[-1] if turns else None
    if not isinstance(last, dict) or "role" not in last or last.get("type", "message") != "message":
        return False
    return last.get("status") in ("in_progress", "incomplete")


def _listed(turns: Any, param: str) -> list[Any]:
    if not isinstance(turns, list):
        raise BadRequestError(f"{param} is a list of objects, got {str(turns)[:80]}", param=param)
    return turns


def _messages(messages: Any, param: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRequestError(f"{param} is a list of objects", param=param)
    return [{**message, "content": _text(message.get("content"), param)} for message in messages]


def _text(content: Any, param: str) -> str:
    """The text of a message; of a list of parts the texts, a line each as in vLLM, without the images."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadRequestError(f"content is a string or a list of parts, got {str(content)[:80]}", param=param)
    texts = [part if isinstance(part, str) else _part(part) for part in content]
    return "\n".join(text for text in texts if text is not None)


def _part(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None
