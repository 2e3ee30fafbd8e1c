"""A slow reference of controlled decoding: transformers only, one request, no cache, nothing shared with
Trimtab.

Written from the definitions alone: PM-MinED by comparing all pairs, a context that is tokenized anew from its
beginning at every token, one full forward pass of both models for every token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoModelForCausalLM, AutoTokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")
SPECIALS = {"<s>", "</s>", "<pad>", "<unk>", "<|endoftext|>"}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the others follow from
    256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Model:
    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @cached_property
    def bytes(self) -> list[bytes | None]:
        """Each token's bytes, None for specials."""
        spellings = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        byte_level = any("Ġ" in spelling for spelling in spellings)
        alphabet = byte_alphabet()
        return [
            None
            if s in SPECIALS
            else bytes(alphabet[c] for c in s)
            if byte_level
            else bytes([int(s[3:5], 16)])
            if BYTE.fullmatch(s)
            else s.replace("▁", " ").encode()
            for s in spellings
        ]

    @cached_property
    def pieces(self) -> list[tuple[int, bytes]]:
        """The tokens that are text and their bytes; those for single bytes, which are what a tokenizer falls
        back to, behind the others."""
        spellings = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        known = [(i, data) for i, data in enumerate(self.bytes) if data]
        return sorted(known, key=lambda piece: bool(BYTE.fullmatch(spellings[piece[0]])))

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.network(torch.tensor([tokens])).logits[0, -1].float()


def distance(left: bytes, right: bytes) -> int:
    try:
        return abs(len(left.decode()) - len(right.decode()))
    except UnicodeDecodeError:
        return abs(len(left) - len(right))


def pm_mined(target: Model, control: Model) -> list[int]:
    by_role = {
        target.tokenizer.bos_token_id: control.tokenizer.bos_token_id,
        target.tokenizer.eos_token_id: control.tokenizer.eos_token_id,
        target.tokenizer.pad_token_id: control.tokenizer.pad_token_id,
        target.tokenizer.unk_token_id: control.tokenizer.unk_token_id,
    }
    table = []
    for token, data in enumerate(target.bytes):
        best, least = -1, 10**9
        if data is None:
            best = by_role.get(token)
            best = -1 if best is None else best
        for i, other in control.pieces if data else ():
            fits = data.startswith(other) or other.startswith(data)
            blank = other == b" " and data.strip(b" ")
            if fits and not blank and (d := distance(data, other)) < least:
                best, least = i, d
        table.append(best)
    return table


@dataclass
class Step:
    token: int
    gap: float
    """How far the best logit is above the second."""


class Texts:
    """What a model's tokenizer makes of bytes, without special tokens and added spaces."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.plain = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        if isinstance(self.plain.pre_tokenizer, Metaspace):
            self.plain.pre_tokenizer = Metaspace(prepend_scheme="never")  # no space that is not in the text
        self.spelled = {data: i for i, data in reversed(model.pieces)}

    def tokenize(self, data: bytes) -> list[int]:
        """Valid stretches as text, bytes that can't be text one by one, the unfinished end later."""
        text = data.decode("utf-8", errors="surrogateescape")
        ids: list[int] = []
        for stretch in re.findall(r"[\udc80-\udcff]|[^\udc80-\udcff]+", text):
            if "\udc80" <= stretch <= "\udcff":
                ids += self.spell(stretch)
            elif self.can_spell(stretch):
                ids += self.encode(stretch)
            else:
                for word in re.findall(r"\s*\S+|\s+", stretch):
                    ids += self.encode(word) if self.can_spell(word) else self.spell(word)
        return ids

    def encode(self, text: str) -> list[int]:
        return self.plain.encode(text, add_special_tokens=False).ids

    def can_spell(self, text: str) -> bool:
        return self.model.tokenizer.unk_token_id not in self.encode(text)

    def spell(self, text: str) -> list[int]:
        """The longest token that fits, again and again; the unknown token for a character without one."""
        ids: list[int] = []
        while text:
            for end in range(len(text), 0, -1):
                token = self.spelled.get(text[:end].encode("utf-8", errors="surrogateescape"))
                if token is not None:
                    break
            ids.append(self.model.tokenizer.unk_token_id if token is None else token)
            text = text[end:]
        return ids


class Reference:
    """One target under one control; `strength` 0 is the target alone."""

    def __init__(
        self,
        target: Model,
        control: Model,
        *,
        parts: Sequence[tuple[Model, float]] | None = None,
        window: int = 10**9,
    ) -> None:
        self.target, self.control = target, control
        self.parts = parts or [(control, 1.0)]
        self.window = window
        self.neutral = True
        self.mapping = pm_mined(target, control)
        self.texts = Texts(control)

    def contexts(self, generated: list[int]) -> Iterator[list[int]]:
        """The control's tokens for nothing, for the first generated token, for the first two, and so on."""
        done: list[int] = []
        run: list[int] = []
        text, waiting = b"", b""
        yield []
        for place, token in enumerate(generated):
            data = self.target.bytes[token] if token < len(self.target.bytes) else b""
            if data is None:
                done += run if not waiting else self.texts.tokenize(text)
                done += [self.mapping[token]] if self.mapping[token] >= 0 else []
                run, text, waiting = [], b"", b""
            elif token < len(self.target.bytes):
                text += data
                if (
                    not waiting
                    and self.mapping[token] >= 0
                    and self.control.bytes[self.mapping[token]] == data
                    and not self.goes_on(generated[:place], token)
                ):
                    run = [*run, self.mapping[token]]
                else:
                    waiting = unfinished(text)
                    run = self.texts.tokenize(text[: len(text) - len(waiting)])
            yield done + run

    def prompt(self, prompt: list[int]) -> list[int]:
        """What a control reads that has no prompt of its own: the text of the target's."""
        return self.control.tokenizer.encode(self.target.tokenizer.decode(prompt))

    def goes_on(self, generated: list[int], token: int) -> bool:
        """Whether a token is the next piece of what is taken in as a whole."""
        return False

    def cut(self, context: list[int]) -> list[int]:
        """What fits into the window: the beginning of a text, where there is one, and the most recent tokens,
        half a window dropped at a time."""
        dropped = 0
        while len(context) - dropped > self.window:
            dropped += self.window // 2
        kept = int(context[:1] == [self.control.tokenizer.bos_token_id])
        return context[:kept] + context[kept + dropped :]

    def row(self, context: list[int]) -> torch.Tensor:
        return sum(weight * model.logits(context) for model, weight in self.parts)

    def routed(self, row: torch.Tensor, mapping: list[int]) -> torch.Tensor:
        routed = torch.full((self.target.network.config.vocab_size,), -1)
        routed[: len(mapping)] = torch.tensor(mapping)
        neutral = row[routed[routed >= 0]].mean() * self.neutral
        return torch.where(routed >= 0, row[routed], neutral)

    def shift(self, context: list[int], strength: float, logits: torch.Tensor) -> torch.Tensor:
        """What is added to the target's `logits`."""
        return strength * self.routed(self.row(self.cut(context)), self.mapping)

    def shift_after(
        self, generated: list[int], contexts: list[list[int]], strength: float, logits: torch.Tensor
    ) -> torch.Tensor:
        """What is added after `generated`; `contexts` are the control's for it and everything before it."""
        return self.shift(contexts[len(generated)], strength, logits)

    def logits(
        self,
        prompt: list[int],
        own_prompt: list[int],
        strength: float,
        forced: list[int],
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        until: int = 0,
        seen: Callable[[torch.Tensor, list[int]], torch.Tensor] = lambda logits, _: logits,
    ) -> Iterator[torch.Tensor]:
        """The controlled logits before each token of `forced`; after the first `until`, the target's.
        Only the `top_k` likeliest tokens are shifted, and those at least `min_p` as likely as the
        likeliest, where it says so. `seen` makes of the target's logits, and what it said so far, those that
        the control sees."""
        contexts = [own_prompt + context for context in islice(self.contexts(forced), len(forced))]
        for position in range(len(forced)):
            logits = self.target.logits(prompt + forced[:position])
            logits = seen(logits, forced[:position])
            if strength and (not until or position < until):
                shift = self.shift_after(forced[:position], contexts, strength, logits)
                if top_k:
                    likely = logits >= logits.sort(descending=True).values[top_k - 1]
                    shift = torch.where(likely, shift, 0.0)
                probabilities = logits.softmax(dim=0)
                shift = torch.where(probabilities >= min_p * probabilities.max(), shift, 0.0)
                logits = logits + shift
            yield logits

    def steps(
        self, prompt: list[int], own_prompt: list[int], strength: float, forced: list[int]
    ) -> Iterator[Step]:
        """For each token of `forced`, what greedy decoding would have chosen after the ones before it."""
        for logits in self.logits(prompt, own_prompt, strength, forced):
            best = logits.topk(2)
            yield Step(int(best.indices[0]), float(best.values[0] - best.values[1]))


Spelling = tuple[int, ...]


class PathReference(Reference):
    """The same with the routing `path`: one node expanded, that the control finds likeliest.

    p'(t) = p(t) * exp(sum over the nodes on the way to t of (s * shift of the next piece - log Z)), where a
    node's Z is over the target's own distribution of next pieces there, and that of the root is a constant.
    """

    def __init__(self, target: Model, control: Model, *, window: int = 10**9, **options):
        super().__init__(target, control, **options)
        limit = min(16, min(window, control.network.config.max_position_embeddings) // 4)
        self.nodes = {node for node in self.passing if len(node) <= limit and self.decides(node)}
        within_reach = (node for node in self.nodes if not self.above(node))
        self.window = window - max(map(len, within_reach), default=0)

    @cached_property
    def spellings(self) -> dict[int, Spelling]:
        """Of each target token that has one, the pieces in which the control would write it."""
        found = {}
        for token, (data, near) in enumerate(zip(self.target.bytes, self.mapping, strict=True)):
            if data and near >= 0 and len(self.control.bytes[near]) <= len(data):
                pieces = (near,) if self.control.bytes[near] == data else tuple(self.texts.tokenize(data))
                texts = [self.control.bytes[piece] for piece in pieces]
                if None not in texts and not (texts[0] == b" " and data.strip(b" ")):
                    found[token] = pieces
        return found

    @cached_property
    def passing(self) -> dict[Spelling, list[int]]:
        """The target tokens whose spelling begins with some pieces."""
        found: dict[Spelling, list[int]] = {}
        for token, pieces in self.spellings.items():
            for length in range(1, len(pieces) + 1):
                found.setdefault(pieces[:length], []).append(token)
        return found

    def next_piece(self, token: int, node: Spelling) -> int | None:
        """None where the token ends at the node."""
        return next(iter(self.spellings[token][len(node) :]), None)

    def decides(self, node: Spelling) -> bool:
        """Whether those that pass it do not all go on in one way."""
        return len({self.next_piece(token, node) for token in self.passing[node]}) > 1

    def above(self, node: Spelling) -> Spelling:
        """The nearest node on the way to it; empty for the root."""
        return next((node[:n] for n in range(len(node) - 1, 0, -1) if node[:n] in self.nodes), ())

    def shift(self, context: list[int], strength: float, logits: torch.Tensor) -> torch.Tensor:
        context = self.cut(context)
        row = self.row(context)
        firsts = [self.spellings.get(token, [near])[0] for token, near in enumerate(self.mapping)]
        shift = strength * self.routed(row, firsts)
        first = shift = self.firsts(shift, strength * row)
        reached = {node: float(row[node[0]]) for node in self.nodes if not self.above(node)}
        if reached:
            node = max(reached, key=reached.__getitem__)
            row = self.row([*context, *node])
            shift = shift + self.decision(node, strength * row, logits + first)
        return shift

    def firsts(self, shift: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        """The shift before any node decides, for the control's row, scaled."""
        return shift

    def decision(self, node: Spelling, scaled: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What an expanded node adds to the shift of the tokens that pass it."""
        tokens = self.passing[node]
        nexts = [self.next_piece(token, node) for token in tokens]
        others = [piece for piece in range(len(self.control.bytes)) if piece not in nexts]
        ending = scaled[others].double().exp().mean().log()
        values = torch.stack([ending if piece is None else scaled[piece].double() for piece in nexts])
        shares = logits.double().softmax(dim=0)[tokens]
        z = (shares * values.exp()).sum() / shares.sum() if shares.any() else torch.tensor(1.0)
        added = torch.zeros_like(logits)
        added[tokens] = (values - z.log()).float()
        return added


class PiecesReference(PathReference):
    """The same with the routing `pieces`.

    Control tokens that the target lacks are spelled in its tokens. The first piece of some gets the mean over
    them; while a spelling is pending, what goes on with it gets the mean over what is left, in the row before
    it, and what ends it shares what the control's own end there gets.
    """

    @cached_property
    def own(self) -> dict[Spelling, list[int]]:
        """Of the beginnings of control tokens' spellings in target tokens, how the control says the text."""
        known, theirs, found = {*filter(None, self.target.bytes)}, Texts(self.target), {}
        for data in self.texts.spelled:
            pieces = tuple(theirs.tokenize(data)) if data not in known else ()
            if len(pieces) > 1 and self.said(pieces) == data:
                found |= {
                    pieces[:length]: self.whole(pieces[:length]) for length in range(1, len(pieces) + 1)
                }
        return found

    def said(self, pieces: Spelling) -> bytes:
        return b"".join(self.target.bytes[piece] or b"" for piece in pieces)

    def whole(self, pieces: Spelling) -> list[int]:
        """The text of target tokens in control tokens, or nothing where the control can't say it."""
        data = self.said(pieces)
        if data in self.texts.spelled:
            return [self.texts.spelled[data]]
        tokens = self.texts.tokenize(data)
        return tokens if b"".join(self.control.bytes[token] or b"" for token in tokens) == data else []

    @cached_property
    def ranks(self) -> dict[int, int]:
        return {token: rank for rank, token in enumerate(sorted(token for token, _ in self.control.pieces))}

    def mean(self, node: Spelling, scaled: torch.Tensor) -> float:
        """Of all that goes through a node of these spellings: the more likely a token, the more it counts."""
        below = [own for other, own in self.own.items() if own and other[: len(node)] == node]
        weights = torch.tensor([1 / (max(self.ranks[i] for i in own) + 50) for own in below]).double()
        return float((scaled[[own[0] for own in below]].double().exp() @ weights / weights.sum()).log())

    def pending(self, generated: list[int]) -> tuple[Spelling, int]:
        """What the last tokens are of some control token, and how many there were before."""
        node, begun = (), 0
        for place, token in enumerate(generated):
            if not node or (*node, token) not in self.own:
                node, begun = (), place
            node = (*node, token) if (*node, token) in self.own else ()
        goes_on = any(len(other) > len(node) and other[: len(node)] == node for other in self.own)
        return (node, begun) if node and goes_on else ((), len(generated))

    def goes_on(self, generated: list[int], token: int) -> bool:
        node, _ = self.pending(generated)
        return bool(node) and (*node, token) in self.own

    def shift_after(
        self, generated: list[int], contexts: list[list[int]], strength: float, logits: torch.Tensor
    ) -> torch.Tensor:
        shift = self.shift(contexts[len(generated)], strength, logits)
        node, begun = self.pending(generated)
        if not node:
            return shift
        return self.resumed(node, strength * self.row(self.cut(contexts[begun])), shift, logits)

    def resumed(
        self, node: Spelling, scaled: torch.Tensor, shift: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """The shift while a spelling is pending, with the row before it, and the shift if it ends there."""
        nexts = {other[-1]: other for other in self.own if other[:-1] == node}
        others = torch.ones(len(logits), dtype=torch.bool)
        others[[*nexts]] = False
        shares = logits.double().softmax(dim=0)[others]
        z = (
            (shares * shift[others].double().exp()).sum() / shares.sum()
            if shares.any()
            else torch.tensor(1.0)
        )
        mean, own = self.mean(node, scaled), self.own[node]
        resumed = shift - float(z.log()) + (float(scaled[own[0]]) - mean if own else 0.0)
        for token, other in nexts.items():
            resumed[token] = self.mean(other, scaled) - mean
        return resumed

    def firsts(self, shift: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        shift = shift.clone()
        for node in self.own:
            if len(node) == 1:
                shift[node[0]] = self.mean(node, scaled)
        return shift


def unfinished(data: bytes) -> bytes:
    """The bytes at the end that begin a character without ending it."""
    for length in (3, 2, 1):
        tail = data[-length:]
        # Only the third byte tells a decoder that this is half of a surrogate pair, which UTF-8 lacks.
        if len(tail) == 2 and tail[0] == 0xED and 0xA0 <= tail[1] <= 0xBF:
            return tail
        for filler in (b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xa0", b"\xa0\x80", b"\x90\x80\x80"):
            try:
                if len(tail) == length and len((tail + filler).decode()) == 1 and tail[0] >= 0xC0:
                    return tail
            except UnicodeDecodeError:
                continue
    return b""


class Segmented(Reference):
    """Alignment in mode `segments`, as on vLLM's V2 runner: each target token's bytes in control tokens.

    When a context is cut depends on what its host knows, and how far on nothing else: `behind` says by how
    many strides a context is cut less than it can be.
    """

    drafts = 0
    behind = 0

    def segment(self, token: int) -> list[int]:
        """One token's bytes; a special token's counterpart."""
        data = self.target.bytes[token] if 0 <= token < len(self.target.bytes) else b""
        if data is None:
            return [self.mapping[token]] if self.mapping[token] >= 0 else []
        spelled = self.texts.spelled
        return [spelled[data]] if data in spelled else self.texts.tokenize(data)

    @cached_property
    def longest(self) -> int:
        return max(len(self.segment(token)) for token in range(len(self.target.bytes)))

    def cut(self, context: list[int]) -> list[int]:
        """Leave out whole strides, so that the next step fits into the window whatever it brings."""
        if len(context) <= self.window // 2:
            return context
        growth = self.longest * (1 + self.drafts)
        limit = self.window - min(max(self.window // 8, growth), self.window // 2)
        strides = max(-(-(len(context) - limit) // (limit // 2)) - self.behind, 0)
        kept = int(context[:1] == [self.control.tokenizer.bos_token_id])
        return context[:kept] + context[kept + strides * (limit // 2) :]

    def contexts(self, generated: list[int]) -> Iterator[list[int]]:
        done: list[int] = []
        yield done
        for token in generated:
            done = done + self.segment(token)
            yield done

    def prompt(self, prompt: list[int]) -> list[int]:
        """The text of a target's prompt in control tokens, without its special tokens."""
        text = [token for token in prompt if self.target.bytes[token] is not None]
        return [self.control.tokenizer.bos_token_id, *(i for token in text for i in self.segment(token))]


class SegmentedPath(Segmented, PathReference):
    """Path routing on the V2 runner."""
