"""Which tokens are trained: from stretches of text to labels, exact to the token.

A text is tokenised in one go, with the place of each token in it, for tokens of parts differ from parts of
tokens. Where a token would reach over the edge of a trained stretch, the text is tokenised in pieces, cut at
the edges: generation, too, begins with a prompt that was tokenised alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veneer.data.batches import IGNORED, batched
from veneer.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True)
class Draft:
    """One example as text.

    Args:
        text: What the model reads.
        spans: Stretches of it that carry loss, as (start, end) in characters, in order.
        specials: The tokenizer adds its own first token (a chat template has written it already).
        stop: An end of text is added, and learnt.
    """

    text: str
    spans: list[Span]
    specials: bool = False
    stop: bool = False


@dataclass(frozen=True)
class Encoded:
    """One example as tokens; `labels` are the ids where they are learnt and -100 elsewhere.

    `answer` is where the last trained stretch begins: what stands before it is the prompt.
    """

    input_ids: list[int]
    labels: list[int]
    answer: int

    def cut(self, length: int) -> Encoded:
        """At most the first `length` tokens."""
        return Encoded(self.input_ids[:length], self.labels[:length], self.answer)

    @property
    def trains(self) -> bool:
        """Some token carries loss."""
        return any(label != IGNORED for label in self.labels)


def encode_drafts(drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase, everything: bool) -> list[Encoded]:
    """Tokens and labels of whole examples, uncut.

    Args:
        drafts: The examples.
        tokenizer: A fast one, which knows the place of each token.
        everything: Train on all tokens instead of the spans.

    Raises:
        UnsupportedError: If the tokenizer is not fast.
    """
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in the text, which masking needs. "
            "Load a fast tokenizer (a folder with tokenizer.json)."
        )
    head = first_tokens(tokenizer)
    added = set(tokenizer.added_tokens_decoder)
    encoded = []
    for batch in batched(drafts):
        tokens = tokenizer(
            [draft.text for draft in batch], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for draft, ids, offsets in zip(batch, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            trained = _trained(draft, ids, offsets, added)
            if trained is None:
                ids, trained = _in_pieces(draft, tokenizer)
            encoded.append(_finish(draft, list(ids), trained, head, tokenizer.eos_token_id, everything))
    return encoded


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before each text: its first token, or nothing."""
    specials = tokenizer("")["input_ids"]
    return list(specials[:1]) if specials and specials[0] == tokenizer.bos_token_id else []


def _finish(
    draft: Draft, ids: list[int], trained: list[bool], head: list[int], eos: int | None, everything: bool
) -> Encoded:
    if draft.specials and ids[: len(head)] != head:
        ids, trained = head + ids, [False] * len(head) + trained
    if draft.stop and eos is not None and (not ids or ids[-1] != eos):
        ids, trained = [*ids, eos], [*trained, True]
    answer = _last_run(trained)
    # Nothing predicts the first token. It would carry no loss anyway, unless rows are packed into one.
    labels = [
        token if (learnt or everything) and place else IGNORED
        for place, (token, learnt) in enumerate(zip(ids, trained, strict=True))
    ]
    return Encoded(ids, labels, answer)


def _last_run(trained: Sequence[bool]) -> int:
    """Where the last stretch of trained tokens begins; the length if there is none."""
    place = len(trained)
    while place and not trained[place - 1]:
        place -= 1
    end = place
    while place and trained[place - 1]:
        place -= 1
    return place if end else len(trained)


def _trained(draft: Draft, ids: Sequence[int], offsets: Sequence[Span], added: set[int]) -> list[bool] | None:
    """Whether each token lies in a span; none if one lies across an edge."""
    edges = sorted({edge for span in draft.spans for edge in span})
    trained = []
    previous = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        low = start
        if token in added:
            # A special token may take the white space beside it (`rstrip`), also from over the edge. It would do so
            # in generation as well, so it stays on the side of its own characters.
            while end > start and draft.text[end - 1].isspace():
                end -= 1
            while start < end and draft.text[start].isspace():
                start += 1
            low = start
        elif previous < start and draft.text[previous:start].isspace():
            # Some tokenizers report " cat" at the place of "cat": the space belongs to this token all the same.
            low = previous
        if any(low < edge < end for edge in edges):
            return None
        trained.append(any(begin <= start < stop for begin, stop in draft.spans))
        previous = max(previous, end)
    return trained


def _in_pieces(draft: Draft, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    edges = sorted({0, len(draft.text), *(edge for span in draft.spans for edge in span)})
    pieces = [(start, end) for start, end in zip(edges, edges[1:], strict=False) if end > start]
    tokens = tokenizer([draft.text[start:end] for start, end in pieces], add_special_tokens=False, verbose=False)
    ids: list[int] = []
    trained: list[bool] = []
    for (start, _), piece in zip(pieces, tokens["input_ids"], strict=True):
        ids += piece
        trained += [any(begin <= start < stop for begin, stop in draft.spans)] * len(piece)
    return ids, trained
