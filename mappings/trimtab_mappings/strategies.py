"""Strategies: how a target token that the control does not have finds a control token all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from trimtab_mappings.pm_mined import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trimtab_mappings.vocabulary import Vocabulary


class Strategy(Protocol):
    """What a mapping strategy is; everything else about a table is the same for all of them."""

    def __call__(self, segments: Mapping[bytes, Sequence[int]], control: Vocabulary) -> Mapping[bytes, int]:
        """Choose control tokens.

        Args:
            segments: the bytes of the target tokens that the control does not have, and each one's bytes
                tokenized by the control.
            control: the control's vocabulary.

        Returns:
            Control ids, for those of the tokens that have one.
        """
        ...


def pm_mined(segments: Mapping[bytes, Sequence[int]], control: Vocabulary) -> Mapping[bytes, int]:
    """The control token at the least edit distance, of those that begin as the token does."""
    return nearest(segments, control.ids)


def exact(segments: Mapping[bytes, Sequence[int]], control: Vocabulary) -> Mapping[bytes, int]:  # noqa: ARG001
    """None: only tokens of the same bytes are mapped."""
    return {}


def first_segment(segments: Mapping[bytes, Sequence[int]], control: Vocabulary) -> Mapping[bytes, int]:
    """The first token of the control's own tokenization of the token, where that spells how it begins."""
    first = {token: segment[0] for token, segment in segments.items() if segment}
    spelled = control.tokens
    return {token: i for token, i in first.items() if spelled[i] and token.startswith(spelled[i])}


DEFAULT = "pm-mined"
STRATEGIES: dict[str, Strategy] = {DEFAULT: pm_mined, "exact": exact, "first-segment": first_segment}
