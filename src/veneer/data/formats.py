"""Ways to write a language-modelling example: prompt and completion, chat, and plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from veneer.data.chat import Message, conversation
from veneer.data.columns import TEXT_NAMES, is_text, named_column, only_column, require_texts, usual_columns
from veneer.data.table import Table
from veneer.errors import ConfigError, DataError
from veneer.options import DataOptions

Format = Literal["prompt-completion", "chat", "text"]

CHATS = ("messages", "conversations", "conversation")
# Prompt, completion, and what stands between them for models without a chat template. Prompts and completions
# are written to be joined as they are; questions and instructions are not.
PAIRS = (
    ("prompt", "completion", ""),
    ("prompt", "response", ""),
    ("instruction", "output", "\n"),
    ("instruction", "response", "\n"),
    ("question", "answer", "\n"),
)


@dataclass(frozen=True)
class Layout:
    """How the examples of a table are written.

    Args:
        format: Which of the ways.
        columns: The conversation; or prompt, completion and perhaps the prompt's second part; or the text.
        separator: Between prompt and completion, without a chat template.
    """

    format: Format
    columns: tuple[str, ...]
    separator: str = ""


@dataclass(frozen=True)
class Example:
    """One example before it is rendered. Plain text has an empty prompt; a conversation has its messages."""

    prompt: str = ""
    completion: str = ""
    messages: list[Message] | None = None


def choose_layout(table: Table, options: DataOptions) -> Layout:
    """Reads the format from the options and the columns.

    Raises:
        DataError: If no format fits the columns, or several do.
        ConfigError: If the options contradict each other.
    """
    named = _named(table, options)
    if named is not None:
        return named
    found = [layout for layout in _found(table) if options.format in ("auto", layout.format)]
    if not found and options.format in ("auto", "text"):
        columns = usual_columns(table.columns, TEXT_NAMES) if options.format == "text" else []
        columns = columns or [column for column in table.columns if is_text(table.values(column))]
        text = only_column(columns, "text", table)
        found = [Layout("text", (text,))] if text is not None else []
    if len(found) > 1:
        ways = "; ".join(f"{layout.format} ({', '.join(layout.columns)})" for layout in found)
        raise DataError(
            f"{table.source} can be read in several ways: {ways}. Choose with --data.format, or name the columns with "
            "--data.text_column (text, messages or prompt) and --data.label_column (completion)."
        )
    if not found:
        pairs = ", ".join(f"{prompt} and {completion}" for prompt, completion, _ in PAIRS)
        raise DataError(
            f"{table.source}: the columns {', '.join(table.columns)} are not those of a language-modelling data set "
            f"(data.format {options.format}). Expected messages or conversations (chat), {pairs} (prompt-completion), "
            "or text. Rename them, or name them with --data.text_column and --data.label_column."
        )
    return found[0]


def _named(table: Table, options: DataOptions) -> Layout | None:
    """The layout of columns that the user named; none if none is named."""
    text, completion = options.text_column, options.label_column
    if text is not None:
        named_column(table, text, "--data.text_column")
    if completion is not None:
        named_column(table, completion, "--data.label_column")
        if text is None or options.format not in ("auto", "prompt-completion"):
            raise ConfigError(
                f"data.label_column is '{completion}'. For causal-lm it names the completion of the format "
                f"prompt-completion (given: {options.format}), and needs data.text_column for the prompt."
            )
        return Layout("prompt-completion", (text, completion))
    if text is None:
        return None
    if options.format == "prompt-completion":
        raise ConfigError(f"data.text_column names the prompt '{text}'. Name the completion with data.label_column.")
    if options.format != "auto":
        return Layout(options.format, (text,))
    return Layout("chat" if _is_list(table, text) else "text", (text,))


def _found(table: Table) -> list[Layout]:
    """The formats whose usual columns are there."""
    columns = {column.strip().lower(): column for column in table.columns}
    chats = [columns[name] for name in CHATS if name in columns and _is_list(table, columns[name])]
    found = [Layout("chat", (column,)) for column in chats]
    for prompt, completion, separator in PAIRS:
        if prompt in columns and completion in columns:
            second = (columns["input"],) if prompt == "instruction" and "input" in columns else ()
            found.append(Layout("prompt-completion", (columns[prompt], columns[completion], *second), separator))
    if "text" in columns:
        found.append(Layout("text", (columns["text"],)))
    return found


def _is_list(table: Table, column: str) -> bool:
    return isinstance(next((value for value in table.rows[column] if value is not None), None), list)


def read_examples(table: Table, layout: Layout, rows: Sequence[int]) -> list[Example]:
    """The examples of some rows.

    Raises:
        DataError: Naming all rows that are not as the format wants them.
    """
    values = [table.values(column, rows) for column in layout.columns]
    if layout.format == "chat":
        return _conversations(table, layout.columns[0], values[0], rows)
    for column, column_values in zip(layout.columns[:2], values, strict=False):
        require_texts(table, column, column_values, rows)
    if layout.format == "text":
        return [Example(completion=text) for text in values[0]]
    second = values[2] if len(values) > 2 else [None] * len(rows)
    return [
        Example(f"{prompt}\n\n{more}" if more and str(more).strip() else prompt, completion)
        for prompt, completion, more in zip(values[0], values[1], second, strict=True)
    ]


def _conversations(table: Table, column: str, values: Sequence[Any], rows: Sequence[int]) -> list[Example]:
    examples: list[Example] = []
    wrong: dict[str, list[int]] = {}
    for row, value in zip(rows, values, strict=True):
        try:
            examples.append(Example(messages=conversation(value)))
        except ValueError as error:
            wrong.setdefault(str(error), []).append(row)
    if wrong:
        reasons = "; ".join(f"{table.places(places)}: {reason}" for reason, places in list(wrong.items())[:5])
        count = sum(map(len, wrong.values()))
        raise DataError(
            f"Column '{column}' is no conversation in {count:,} of {len(rows):,} rows: {reasons}. "
            "Correct or remove these rows."
        )
    return examples
