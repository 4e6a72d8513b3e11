"""Which tokens are trained: from stretches of text to labels, exact to the token.

A text is tokenised in one go, with the place of each token in it, for tokens of parts differ from parts of
tokens. Where a token would reach over the edge of a trained stretch, the text is cut there first: generation,
too, begins with a prompt that was tokenised alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from veneer.data.batches import IGNORED, batched
from veneer.errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True)
class Draft:
    """One example as text.

    Args:
        text: What the model reads.
        spans: Stretches of it that carry loss, as (start, end) in characters, in order, none within another.
        specials: The tokenizer adds its own first token (a chat template has written it already).
        stop: An end of text is added, and learnt.
        partial: There are more such stretches, behind the point where the text will be cut.
    """

    text: str
    spans: list[Span]
    specials: bool = False
    stop: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Encoded:
    """One example as tokens; `labels` are the ids where they are learnt and -100 elsewhere.

    `answer` is where the last trained stretch begins: what stands before it is the prompt. Where that is not known,
    it is the number of tokens.
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
    added = tokenizer.added_tokens_decoder
    encoded = []
    for batch in batched(drafts):
        tokens = tokenizer(
            [draft.text for draft in batch], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for draft, ids, offsets in zip(batch, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            trained, crossed = _trained(draft, ids, offsets, added, _edges(draft))
            if crossed:
                ids, trained = _in_pieces(draft, tokenizer, added, crossed)
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
    answer = len(ids) if draft.partial else _last_run(trained)
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


def _trained(
    draft: Draft, ids: Sequence[int], offsets: Sequence[Span], added: Mapping[int, AddedToken], edges: Sequence[int]
) -> tuple[list[bool], set[int]]:
    """Whether each token lies in a span, and which edges lie within a token."""
    text = draft.text
    begins = [begin for begin, _ in draft.spans]
    trained: list[bool] = []
    crossed: set[int] = set()
    previous, absorbs = 0, False
    for token, (start, end) in zip(ids, offsets, strict=True):
        low, high = start, end
        if token in added:
            # A special token may take the white space beside it (`rstrip`, `lstrip`), also from over an edge. It does
            # so in generation as well, so it belongs where its own characters are.
            while high > low and text[high - 1].isspace():
                high -= 1
            while low < high and text[low].isspace():
                low += 1
        elif not absorbs and previous < start and text[previous:start].isspace():
            # Some tokenizers report " cat" at the place of "cat"; the space belongs to this token all the same.
            low = previous
        crossed.update(edges[bisect_right(edges, low) : bisect_left(edges, high)])
        span = bisect_right(begins, low) - 1
        trained.append(span >= 0 and low < draft.spans[span][1])
        previous, absorbs = max(previous, end), token in added and added[token].rstrip
    return trained, crossed


def _in_pieces(
    draft: Draft, tokenizer: PreTrainedTokenizerBase, added: Mapping[int, AddedToken], cuts: set[int]
) -> tuple[list[int], list[bool]]:
    """Tokenises the text in pieces, cut at `cuts` and at any edge that then still lies within a token."""
    edges = _edges(draft)
    while True:
        bounds = sorted({0, len(draft.text), *cuts})
        ids: list[int] = []
        trained: list[bool] = []
        crossed: set[int] = set()
        for start, end in pairwise(bounds):
            piece = Draft(draft.text[start:end], [(low - start, high - start) for low, high in draft.spans])
            tokens = tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            within = [edge - start for edge in edges]
            learnt, over = _trained(piece, tokens["input_ids"], tokens["offset_mapping"], added, within)
            ids += tokens["input_ids"]
            trained += learnt
            crossed |= {edge + start for edge in over}
        if not crossed:
            return ids, trained
        cuts = cuts | crossed


def _edges(draft: Draft) -> list[int]:
    return sorted({edge for span in draft.spans for edge in span})
