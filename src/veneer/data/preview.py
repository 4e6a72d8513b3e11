"""What the model sees of an example, with what it is trained on marked: to be looked at before step 1."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from veneer.data.batches import IGNORED

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

# Marks, besides colour: logs, screen readers and colour-blind people have none.
OPEN, CLOSE = "⟦", "⟧"


def preview(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None = None
) -> Text:
    """An encoded example for the terminal: trained stretches in bold between ⟦ and ⟧, the rest dim.

    Args:
        example: `input_ids` and `labels`, as in `TaskData.train`.
        tokenizer: The one it was encoded with.
        labels: Class names, for classification.
    """
    from rich.text import Text

    text = Text()
    for piece, trained in _pieces(example, tokenizer, labels):
        text.append(piece, style="bold green" if trained else "dim")
    return text


def preview_text(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None = None
) -> str:
    """The same without style, for logs."""
    return "".join(piece for piece, _ in _pieces(example, tokenizer, labels))


def _pieces(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None
) -> Iterator[tuple[str, bool]]:
    ids, targets = list(example["input_ids"]), example["labels"]
    if isinstance(targets, int):
        # Classification: no token is trained on, the class is.
        name = labels[targets].replace("_", " ") if labels else str(targets)
        yield _printable(_decode(ids, tokenizer)) + " ", False
        yield f"{OPEN}{_printable(name)}{CLOSE}", True
        return
    for trained, run in groupby(range(len(ids)), key=lambda place: targets[place] != IGNORED):
        places = list(run)
        piece = _printable(_decode_within(ids, places[0], places[-1] + 1, tokenizer))
        yield (f"{OPEN}{piece}{CLOSE}" if trained else piece), trained


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _decode_within(ids: Sequence[int], start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A stretch as it reads in its place: many tokenizers drop the space before the first of the tokens they decode."""
    before, through = _decode(ids[:start], tokenizer), _decode(ids[:end], tokenizer)
    return through[len(before) :] if through.startswith(before) else _decode(ids[start:end], tokenizer)


def _printable(text: str) -> str:
    """Shows control characters as escapes: data must not steer the terminal."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else char.encode("unicode_escape").decode()
        for char in text
    )
