"""Special tokens: which of them play which role, and which of another tokenizer stands for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from trimtab_mappings.vocabulary import Vocabulary

_BRACKETS = re.compile(r"[<\[{(|｜].*[>\]})|｜]")  # noqa: RUF001 - DeepSeek writes wide bars
_PRIVATE = "\U000f1234"  # a character that no vocabulary has
_QUESTION, _ANSWER, _SYSTEM = "What is it?", "An answer.", "A rule."


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of one tokenizer."""

    ids: frozenset[int]
    """All of them: ids that stand for no text."""
    roles: Mapping[str, tuple[int, ...]]
    """Which of them play which role; `end_of_turn`: those besides eos that end a generation."""
    turn_end: int | None
    """The token that the chat template writes behind an answer; it may be eos."""
    unknown: int | None
    """The token that the tokenizer's model says for what it can't spell."""


def find_special_tokens(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, eos_ids: Iterable[int]
) -> SpecialTokens:
    """Find the special tokens of a tokenizer.

    A padding or unknown token that is ordinary text, such as `!`, stays text. An unknown token that is also
    eos, bos or padding is none.

    Args:
        tokenizer: names the roles, and has the chat template.
        backend: the `tokenizers.Tokenizer` behind it.
        eos_ids: all tokens that end a generation, by the generation config.
    """
    added = tokenizer.added_tokens_decoder
    turn_end = _turn_end(tokenizer)
    named = _named_roles(tokenizer)
    ends = ({*eos_ids, turn_end} & added.keys()) - {named.get("eos")}
    taken = ends | {named[role] for role in ("eos", "bos", "pad") if role in named}
    unknown = _unknown(backend)
    if unknown in taken or (unknown is not None and _is_text(backend, unknown)):
        unknown = None
    texts = {named[role] for role in ("pad", "unk") if role in named and _is_text(backend, named[role])}
    texts -= ends | {named[role] for role in ("eos", "bos") if role in named}
    roles = {role: (i,) for role, i in named.items() if i not in texts and (role != "unk" or i not in taken)}
    if unknown is not None:
        roles.setdefault("unk", (unknown,))
    if ends:
        roles["end_of_turn"] = tuple(sorted(ends))
    flagged = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    ids = frozenset(flagged - texts).union(*roles.values(), [] if unknown is None else [unknown])
    return SpecialTokens(ids, roles, turn_end if turn_end in ids else None, unknown)


def _named_roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    named = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    return {role: token_id for role, token_id in named.items() if token_id is not None}


def _unknown(backend: Tokenizer) -> int | None:
    """The unknown token of the model itself; Unigram does not name it, but says it."""
    if hasattr(backend.model, "unk_token"):
        token: str | None = backend.model.unk_token
        return None if token is None else backend.model.token_to_id(token)
    said = _model_says(backend, _PRIVATE)
    return said[0] if len(said) == 1 else None


def _is_text(backend: Tokenizer, token_id: int) -> bool:
    """Whether the model itself says the token when it reads it: so it is ordinary text."""
    spelling = backend.model.id_to_token(token_id)
    if spelling is None or _BRACKETS.fullmatch(spelling):
        return False
    return _model_says(backend, spelling) == [token_id]


def _model_says(backend: Tokenizer, text: str) -> list[int]:
    try:
        return [token.id for token in backend.model.tokenize(text)]
    except Exception:  # noqa: BLE001 - the class itself: a model that needs an unknown token and has none
        return []


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes behind an answer."""
    if not tokenizer.chat_template:
        return None
    for messages in _conversations():
        _, written, behind = _rendered(tokenizer, messages).rpartition(_ANSWER)
        if written:
            ids = tokenizer.encode(behind.lstrip(), add_special_tokens=False)
            return ids[0] if ids else None
    return None


def _conversations() -> Iterator[list[dict[str, Any]]]:
    """Messages in the forms that templates take: as texts or lists of parts, some only behind a system's."""
    for system in (False, True):
        for question_in_parts, answer_in_parts in ((False, False), (True, True), (True, False)):
            yield [
                *([_message("system", _SYSTEM, in_parts=question_in_parts)] if system else []),
                _message("user", _QUESTION, in_parts=question_in_parts),
                _message("assistant", _ANSWER, in_parts=answer_in_parts),
            ]


def _message(role: str, text: str, *, in_parts: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # noqa: BLE001 - it refuses these messages, or is broken in any other way
        return ""


def counterparts(target: Vocabulary, control: Vocabulary) -> dict[int, int]:
    """Return the control's token for each special token of the target; -1 if there is none.

    The same name comes first, then the same role. Only tokens that end a generation go by their role first.
    If a token has several roles, the last one counts: that for which a model generates it.
    """
    by_name = {name: token_id for token_id, name in control.names.items()}
    pairs = {token_id: by_name.get(name, -1) for token_id, name in target.names.items()}
    nameless = {token_id for token_id, own in pairs.items() if own == -1}
    ends = {*_all_ends(control)}
    for role in ("pad", "unk", "bos"):
        # A padding token that is also the control's eos would lend the target's padding the shift of an end.
        own = [i for i in control.roles.get(role, ()) if role == "bos" or i not in ends]
        pairs |= {token_id: own[0] for token_id in target.roles.get(role, ()) if own and token_id in nameless}
    return pairs | dict(_ends(target, control, by_name))


def _ends(target: Vocabulary, control: Vocabulary, by_name: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    """Pair what ends a turn with what ends the control's, other ends with that of their name or with eos.

    If one side does not tell which of its ends is that of a turn, an end of the same name comes first.
    """
    turns, own_turns = turn_ends(target), turn_ends(control)
    own_ends = (*control.roles.get("eos", ()), *control.roles.get("end_of_turn", ()))
    turn, own_turn_is_known = _known_turn_end(target), _known_turn_end(control) is not None
    for token_id in _all_ends(target):
        same = by_name.get(target.names.get(token_id, ""))
        candidates = own_turns if token_id in turns else own_ends
        namesakes = candidates if token_id == turn and own_turn_is_known else own_ends
        takes_any_name = token_id not in turns and token_id not in target.roles.get("eos", ())
        if same is not None and (same in namesakes or takes_any_name):
            yield token_id, same
        else:
            yield token_id, candidates[0] if candidates else -1


def _all_ends(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return every token that ends a generation, eos last."""
    return (*vocabulary.roles.get("end_of_turn", ()), *vocabulary.roles.get("eos", ()))


def turn_ends(vocabulary: Vocabulary) -> tuple[int, ...]:
    """What ends a turn: by the chat template, else all that end a generation besides eos, else eos."""
    if vocabulary.turn_end is not None:
        return (vocabulary.turn_end,)
    return vocabulary.roles.get("end_of_turn") or vocabulary.roles.get("eos", ())


def _known_turn_end(vocabulary: Vocabulary) -> int | None:
    """Return the token that ends a turn; None if no template says which of several ends does."""
    ends = _all_ends(vocabulary)
    return ends[0] if vocabulary.turn_end is None and len(ends) == 1 else vocabulary.turn_end
