"""A control's own prompt: the messages in its chat template and its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trimtab_mappings import load_tokenizer
from trimtab_server.errors import BadRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trimtab_processors.pack import Pack


def chat_of(path: str, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A request's conversation as that of a chat request.

    Args:
        path: the endpoint.
        body: what it was sent.

    Returns:
        A body with `messages`; None where the endpoint has no conversation, or not all of it is in the body.
    """
    match path:
        case "/v1/chat/completions":
            return body
        case "/v1/messages":
            return {"messages": [*_system(body.get("system")), *_listed(body.get("messages"), "messages")]}
        case "/v1/responses" if not body.get("previous_response_id"):
            given = body.get("input")
            turns = (
                [{"role": "user", "content": given}] if isinstance(given, str) else _listed(given, "input")
            )
            spoken = [turn for turn in turns if not isinstance(turn, dict) or "role" in turn]
            return {"messages": [*_system(body.get("instructions")), *spoken]}
    return None


class Prompter:
    """Renders and tokenizes chats for one control; safe to call from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        # The backend itself: the wrapper's own call changes its truncation, which threads must not share.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, body: Mapping[str, Any]) -> list[int]:
        """The prompt of a chat request, as the control's token ids.

        Raises:
            BadRequestError: `messages` is no list of objects, or the template refuses them.
        """
        messages = _messages(body.get("messages"))
        continues = bool(body.get("continue_final_message"))
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=bool(body.get("add_generation_prompt", not continues)),
                continue_final_message=continues,
            )
            # A batch of one: unlike a single text, it is encoded without Python's global lock, so that other
            # requests go on meanwhile.
            return list(self._backend.encode_batch([text], add_special_tokens=False)[0].ids)
        except Exception as error:  # a template is data, and fails in any way it likes
            message = f"The control's chat template can't render these messages: {error}"
            raise BadRequestError(message, param="messages") from error


def load_prompter(pack: Pack) -> Prompter | None:
    """The prompter of a pack, with its first component's tokenizer; None where there is no chat template.

    Raises:
        trimtab_mappings.vocabulary.VocabularyError: there is no tokenizer to load.
    """
    tokenizer = load_tokenizer(pack.components[0].model)
    if pack.chat_template is None and tokenizer.chat_template is None:
        return None
    return Prompter(tokenizer, pack.chat_template)


def _system(content: Any) -> list[dict[str, Any]]:
    return [] if content is None else [{"role": "system", "content": content}]


def _listed(turns: Any, param: str) -> list[Any]:
    if not isinstance(turns, list):
        raise BadRequestError(f"{param} is a list of objects, got {str(turns)[:80]}", param=param)
    return turns


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRequestError("messages is a list of objects", param="messages")
    return [{**message, "content": _text(message.get("content"))} for message in messages]


def _text(content: Any) -> str:
    """The text of a message; of a list of parts the texts, a line each as in vLLM, without the images."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadRequestError(
            f"content is a string or a list of parts, got {str(content)[:80]}", param="messages"
        )
    texts = [part if isinstance(part, str) else _part(part) for part in content]
    return "\n".join(text for text in texts if text is not None)


def _part(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None
