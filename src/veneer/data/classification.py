"""Text classification: texts and class names to tokens and class numbers."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.data.batches import Collator, TaskData, batched, to_dataset, usable_length
from veneer.data.columns import choose_columns, named_column, require_texts
from veneer.data.files import HELD_OUT, read_table
from veneer.data.subsets import hold_out, subset
from veneer.data.table import Table, describe
from veneer.errors import ConfigError, DataError, VeneerWarning
from veneer.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def display_name(label: str) -> str:
    """A class name as people read it.

    >>> display_name("credit_card_lost")
    'credit card lost'
    """
    return label.replace("_", " ")


@dataclass(frozen=True)
class Labelled:
    """All examples of a table: row number i of the table is `texts[i]` with `labels[i]`."""

    table: Table
    texts: list[str]
    labels: list[str]


def load_classification(options: DataOptions, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Reads, checks, splits and encodes a classification data set. See `load_task`."""
    table = read_table(options.train, options.split)
    text, label = choose_columns(table, options.text_column, options.label_column)
    report = [f"Read {len(table):,} rows from {table.source}: text in '{text}', label in '{label}'."]
    unused = [column for column in table.columns if column not in (text, label)]
    if unused:
        report.append(f"Columns not used: {', '.join(unused)}.")
    train = read_labelled(table, text, label)
    names = order_labels(train.labels, _class_names(table, label))
    _check_labels(names, train, label)

    if options.validation is None:
        kept, held = hold_out(train.labels, options.validation_share, seed)
        other = train
        if held:
            report.append(f"Held out {len(held):,} of the rows, split by class with seed {seed}.")
    else:
        other = _read_other(options.validation, text, label, names)
        kept, held = list(range(len(table))), list(range(len(other.table)))
        report.append(f"Read {len(held):,} held-out rows from {other.table.source}.")
    if options.limit is not None and options.limit < len(names):
        raise ConfigError(
            f"data.limit is {options.limit}, but there are {len(names)} classes. Allow at least one example of each."
        )
    kept = [kept[i] for i in subset([train.labels[row] for row in kept], options.limit, seed, each=1)]
    held = [held[i] for i in subset([other.labels[row] for row in held], options.validation_limit, seed)]

    length, lines = usable_length(options.max_length, tokenizer)
    report += lines
    data = _encode_rows("Training", train, kept, names, tokenizer, length, report)
    evaluation = _encode_rows("Held out", other, held, names, tokenizer, length, report) if held else None
    report += _shared({train.texts[row] for row in kept}, [other.texts[row] for row in held])
    return TaskData("classification", data, evaluation, names, Collator.of(tokenizer), report, max_length=length)


def load_labelled(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, seed: int, names: Sequence[str]
) -> TaskData:
    """Reads examples to evaluate a trained model on. See `load_evaluation`."""
    table = read_table(options.train, options.split, prefer=HELD_OUT)
    text, label = choose_columns(table, options.text_column, options.label_column)
    data = read_labelled(table, text, label)
    _check_known(names, data)
    report = [f"Read {len(table):,} rows from {table.source}: text in '{text}', label in '{label}'."]
    length, lines = usable_length(options.max_length, tokenizer)
    report += lines
    rows = subset(data.labels, options.limit, seed)
    encoded = _encode_rows("Evaluation", data, rows, names, tokenizer, length, report)
    empty = to_dataset([], [])
    return TaskData("classification", empty, encoded, list(names), Collator.of(tokenizer), report, max_length=length)


def read_labelled(table: Table, text: str, label: str) -> Labelled:
    """All texts and labels of a table.

    Raises:
        DataError: Naming the rows in which either is missing or of another type.
    """
    texts = table.values(text)
    require_texts(table, text, texts)
    names = _class_names(table, label)
    labels: list[str | None] = []
    for row, value in enumerate(table.values(label)):
        try:
            labels.append(label_name(value, names))
        except ValueError as error:
            raise DataError(f"{table.place(row)}: column '{label}' has {describe(value)}. {error}") from None
    require_texts(table, label, labels)
    return Labelled(table, texts, [name for name in labels if name is not None])


def _read_other(source: str, text: str, label: str, names: Sequence[str]) -> Labelled:
    """The held-out table, which must have the columns and the classes of the training table."""
    table = read_table(source, prefer=HELD_OUT)
    named_column(table, text, "the text column of the training data")
    named_column(table, label, "the label column of the training data")
    other = read_labelled(table, text, label)
    _check_known(names, other)
    return other


def _encode_rows(
    part: str,
    data: Labelled,
    rows: Sequence[int],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    report: list[str],
) -> Dataset:
    """Some rows as tokens and class numbers; adds to the report how many there are and how many were cut."""
    ids, cut = encode([data.texts[row] for row in rows], tokenizer, length)
    empty = [row for row, tokens in zip(rows, ids, strict=True) if not tokens]
    if empty:
        raise DataError(
            f"The tokenizer makes no token of the text at {data.table.places(empty)}. Correct or remove these rows."
        )
    labels = [data.labels[row] for row in rows]
    report.append(f"{part}: {len(rows):,} examples ({_balance(names, labels)}).")
    if cut:
        report.append(f"{part}: {cut:,} of {len(rows):,} texts were cut to {length:,} tokens (data.max_length).")
    number = {name: index for index, name in enumerate(names)}
    return to_dataset(ids, [number[name] for name in labels])


def label_name(value: Any, names: Sequence[str] | None = None) -> str | None:
    """A label as text, without surrounding spaces; none if there is none.

    Args:
        value: As read: a text, a whole number or a truth value.
        names: Class names of a `ClassLabel` column, whose values are positions in this list (-1: no label).

    Raises:
        ValueError: If it is none of these.

    >>> label_name(" ham "), label_name(3), label_name(1.0), label_name(True), label_name(0, ["ham", "spam"])
    ('ham', '3', '1', 'true', 'ham')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        raise ValueError("Expected a class: numbers on a scale are not classes, group them first.")
    if isinstance(value, int) and names is not None:
        return names[value] if value >= 0 else None
    if isinstance(value, int | str):
        return str(value).strip()
    raise ValueError("Expected one class: a text, a whole number, true or false.")


def _class_names(table: Table, label: str) -> list[str] | None:
    """The names that a column declares (`datasets.ClassLabel`)."""
    return getattr(table.rows.features[label], "names", None)


def order_labels(labels: Sequence[str], declared: Sequence[str] | None = None) -> list[str]:
    """The different labels: as declared, else by number where all are numbers, else by name.

    >>> order_labels(["10", "9", "9"]), order_labels(["b", "a"]), order_labels(["b", "a"], ["b", "a", "c"])
    (['9', '10'], ['a', 'b'], ['b', 'a'])
    """
    present = set(labels)
    if declared is not None:
        # A declared class without examples gets no output: the model could not learn when to choose it.
        return [name for name in declared if name in present]
    try:
        return sorted(present, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(present)


def _check_labels(names: Sequence[str], data: Labelled, column: str) -> None:
    table, given = data.table, data.labels
    if len(names) == 1:
        raise DataError(
            f"{table.source}: all {len(given):,} rows have the label '{names[0]}' (column '{column}'). "
            "Expected at least two classes; add rows of another class, or name another column."
        )
    if len(given) >= 20 and len(names) > len(given) / 2:
        warnings.warn(
            f"{table.source}: column '{column}' has {len(names):,} different labels in {len(given):,} rows. "
            "Is it the label? Name the column with --data.label_column.",
            VeneerWarning,
            stacklevel=3,
        )
    spellings = Counter(name.casefold() for name in names)
    similar = [name for name in names if spellings[name.casefold()] > 1]
    if similar:
        warnings.warn(
            f"{table.source}: labels that differ only in upper and lower case are taken as different classes: "
            f"{', '.join(similar)}. Write them alike if they are the same.",
            VeneerWarning,
            stacklevel=3,
        )


def _check_known(names: Sequence[str], data: Labelled) -> None:
    unknown: dict[str, list[int]] = {}
    for row, name in enumerate(data.labels):
        if name not in names:
            unknown.setdefault(name, []).append(row)
    if unknown:
        found = "; ".join(f"'{name}' at {data.table.places(unknown[name])}" for name in sorted(unknown))
        raise DataError(
            f"{data.table.source} has labels unseen in training: {found}. Training has: {', '.join(names)}. "
            "Correct them, add training examples of them, or remove these rows."
        )


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[list[int]], int]:
    """Token ids with the model's special tokens, and the number of texts that had to be cut."""
    rows: list[list[int]] = []
    cut = 0
    for batch in batched(texts):
        ids = tokenizer(list(batch), verbose=False)["input_ids"]
        long = [index for index, row in enumerate(ids) if len(row) > max_length]
        if long:
            # Again by the tokenizer, which cuts the text but keeps the special token behind it.
            shorter = tokenizer([batch[index] for index in long], truncation=True, max_length=max_length)["input_ids"]
            for index, row in zip(long, shorter, strict=True):
                ids[index] = row
        rows += ids
        cut += len(long)
    return rows, cut


def _balance(names: Sequence[str], labels: Sequence[str], show: int = 10) -> str:
    counts = Counter(labels)
    lines = [f"{display_name(name)} {counts[name]:,} = {counts[name] / len(labels):.0%}" for name in names[:show]]
    return ", ".join(lines) + (f" and {len(names) - show} more classes" if len(names) > show else "")


def _shared(train: set[str], held: Sequence[str]) -> list[str]:
    """Held-out texts that were trained on make the result look better than it is."""
    count = sum(text in train for text in held)
    if count and count == len(held):
        warnings.warn(
            "Every held-out text is also a training text, so the evaluation says nothing about new texts. Name other "
            "rows with data.validation.",
            VeneerWarning,
            stacklevel=3,
        )
    return [f"{count:,} of {len(held):,} held-out texts also stand in the training data."] if count else []
