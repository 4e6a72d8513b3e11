"""Which column is the text and which the label: the named one, one of a usual name, or the only one that fits.

Two that fit are an error, not a guess: a wrong column trains without complaint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from veneer.data.table import Table, describe
from veneer.errors import DataError, nearest

TEXT_NAMES = (
    "text", "sentence", "review", "content", "tweet", "message", "body", "comment", "document", "post", "snippet",
    "utterance", "query", "question", "input", "headline",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "emotion", "stars", "rating",
    "spam", "airline_sentiment", "coarse_label",
)  # fmt: skip

# A column with more different values than this is no label column unless it is named.
MOST_CLASSES = 100


def named_column(table: Table, column: str, flag: str) -> str:
    """The column of that exact name.

    Raises:
        DataError: If there is none.
    """
    if column in table.columns:
        return column
    raise DataError(
        f"{table.source} has no column '{column}' ({flag}).{nearest(column, table.columns)} "
        f"Its columns are: {', '.join(table.columns)}."
    )


def usual_columns(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Columns whose name, in lower case, is one of the usual ones."""
    return [column for column in columns if column.strip().lower() in names]


def choose_columns(table: Table, text: str | None, label: str | None) -> tuple[str, str]:
    """Names of the text and of the label column of a classification table.

    Args:
        table: The rows.
        text: The text column, if the user named it.
        label: The label column, if the user named it.

    Raises:
        DataError: If a named one is missing, or none or several fit.
    """
    if text is not None:
        named_column(table, text, "--data.text_column")
    if label is not None:
        named_column(table, label, "--data.label_column")
    if text is not None and text == label:
        raise DataError(f"Column '{text}' of {table.source} is named as both text and label. Name two columns.")
    others = [column for column in table.columns if column not in (text, label)]
    # Names first, for both: they leave fewer columns to tell apart by their values.
    text = text or only_column(usual_columns(others, TEXT_NAMES), "text", table)
    label = label or only_column(usual_columns([c for c in others if c != text], LABEL_NAMES), "label", table)
    others = [column for column in others if column not in (text, label)]
    if text is None or label is None:
        few = [column for column in others if is_label(table.values(column))]
        texts = [column for column in others if column not in few and is_text(table.values(column))]
        text = text or only_column(texts, "text", table) or _none("text", table)
        label = label or only_column([c for c in few if c != text], "label", table) or _none("label", table)
    return text, label


def only_column(fitting: Sequence[str], role: str, table: Table) -> str | None:
    """The one column that fits, or none.

    Raises:
        DataError: If several do.
    """
    if len(fitting) > 1:
        raise DataError(
            f"{table.source}: several columns may be the {role}: {', '.join(fitting)}. Name the one that is, "
            f"for example --data.{role}_column {fitting[0]} (all columns: {', '.join(table.columns)})."
        )
    return fitting[0] if fitting else None


def _none(role: str, table: Table) -> str:
    raise DataError(
        f"{table.source}: no column looks like the {role}. Its columns are: {', '.join(table.columns)}. Name one with "
        f"--data.{role}_column; if these are no names but values, add a first line with the names."
    )


def is_text(values: Sequence[Any]) -> bool:
    """Texts that are not all numbers."""
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, str) for value in present) and not all(map(_is_number, present))


def is_label(values: Sequence[Any]) -> bool:
    """Texts, whole numbers or truth values, of which there are few different ones."""
    present = [value for value in values if value is not None]
    if not all(isinstance(value, str | int) for value in present):
        return False
    return 2 <= len(set(present)) <= min(MOST_CLASSES, max(2, len(present) // 2))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def require_texts(table: Table, column: str, values: Sequence[Any], indices: Sequence[int] | None = None) -> None:
    """Checks that each value of a column is a text that is not blank.

    Args:
        table: Where the values come from.
        column: Its name.
        values: The values.
        indices: The row of each value; none if they are all rows.

    Raises:
        DataError: Naming the rows that are not.
    """
    rows = range(len(values)) if indices is None else indices
    for row, value in zip(rows, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{table.place(row)}: column '{column}' has {describe(value)}. Expected a text; name another column, "
                "or write it as text."
            )
    blank = [row for row, value in zip(rows, values, strict=True) if value is None or not value.strip()]
    if blank:
        raise DataError(
            f"Column '{column}' is empty in {len(blank):,} of {len(values):,} rows: {table.places(blank)}. "
            "Fill in or remove these rows."
        )
