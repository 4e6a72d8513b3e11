"""Causal language modelling: examples to tokens, with loss on what the model is to learn to write."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veneer.data.batches import IGNORED, Collator, Prompt, TaskData, to_dataset, usable_length
from veneer.data.chat import chat_draft, in_words
from veneer.data.columns import named_column
from veneer.data.files import HELD_OUT, read_table
from veneer.data.formats import Example, Layout, choose_layout, read_examples
from veneer.data.masking import Draft, Encoded, encode_drafts
from veneer.data.subsets import hold_out, subset
from veneer.data.table import Table
from veneer.errors import DataError, VeneerWarning
from veneer.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Plain text has no prompt of its own: up to so many of its first tokens serve as one.
TEXT_PROMPT = 32


def load_language(options: DataOptions, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Reads, checks, splits and encodes a language-modelling data set. See `load_task`."""
    table = read_table(options.train, options.split)
    layout = choose_layout(table, options)
    report = _opening(table, layout, tokenizer, options)
    if options.validation is None:
        kept, held = hold_out([0] * len(table), options.validation_share, seed)
        other = table
        if held:
            report.append(f"Held out {len(held):,} of the rows, chosen with seed {seed}.")
    else:
        other = _read_other(options.validation, layout)
        kept, held = list(range(len(table))), list(range(len(other)))
        report.append(f"Read {len(held):,} held-out rows from {other.source}.")
    kept = [kept[i] for i in subset([0] * len(kept), options.limit, seed)]
    held = [held[i] for i in subset([0] * len(held), options.validation_limit, seed)]
    encoder = Encoder(layout, tokenizer, options)
    report += encoder.report
    train = encoder.encode("Training", table, kept)
    evaluation = encoder.encode("Held out", other, held) if held else None
    return encoder.task_data(train, evaluation, report)


def load_language_evaluation(options: DataOptions, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Reads examples to evaluate a trained model on. See `load_evaluation`."""
    table = read_table(options.train, options.split, prefer=HELD_OUT)
    layout = choose_layout(table, options)
    encoder = Encoder(layout, tokenizer, options)
    rows = subset([0] * len(table), options.limit, seed)
    report = _opening(table, layout, tokenizer, options) + encoder.report
    return encoder.task_data(None, encoder.encode("Evaluation", table, rows), report)


def _read_other(source: str, layout: Layout) -> Table:
    table = read_table(source, prefer=HELD_OUT)
    for column in layout.columns:
        named_column(table, column, "a column of the training data")
    return table


def _opening(table: Table, layout: Layout, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> list[str]:
    """What was read and how it is understood."""
    columns = ", ".join(f"'{column}'" for column in layout.columns)
    lines = [f"Read {len(table):,} rows from {table.source}: {layout.format} in {columns}."]
    unused = [column for column in table.columns if column not in layout.columns]
    if unused:
        lines.append(f"Columns not used: {', '.join(unused)}.")
    if layout.format == "prompt-completion":
        if tokenizer.chat_template:
            lines.append("Prompt and completion are written as user and assistant in the model's chat template.")
        else:
            lines.append(f"The tokenizer has no chat template: prompt, {layout.separator!r} and completion are joined.")
    if layout.format == "text" and options.train_on == "completions":
        lines.append("Plain text has no prompt, so all of it is trained on.")
    return lines


@dataclass(frozen=True)
class Part:
    """Encoded examples that have something to learn, cut to length, beside what they were made from."""

    examples: list[Example]
    encoded: list[Encoded]
    lines: list[str]

    def dataset(self) -> Dataset:
        """Its tokens and labels."""
        return to_dataset([row.input_ids for row in self.encoded], [row.labels for row in self.encoded])


class Encoder:
    """Turns rows of a table into tokens, always in the same way."""

    def __init__(self, layout: Layout, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> None:
        if layout.format == "chat" and not tokenizer.chat_template:
            raise DataError(
                "The data are conversations, but the tokenizer has no chat template. Use an instruction-tuned model, "
                "or write the data as prompt and completion."
            )
        self.layout = layout
        self.tokenizer = tokenizer
        self.everything = options.train_on == "all" or layout.format == "text"
        self.length, self.report = usable_length(options.max_length, tokenizer)

    def encode(self, part: str, table: Table, rows: Sequence[int]) -> Part:
        """Some rows, without those of which nothing is left to learn.

        Raises:
            DataError: If a row cannot be rendered, or nothing is left of any row.
        """
        examples = read_examples(table, self.layout, rows)
        drafts = []
        for row, example in zip(rows, examples, strict=True):
            try:
                drafts.append(self._draft(example))
            except ValueError as error:
                raise DataError(f"{table.place(row)}: {error}.") from error
        whole = encode_drafts(drafts, self.tokenizer, self.everything)
        encoded = [row.cut(self.length) for row in whole]
        empty = [row for row, after in zip(rows, encoded, strict=True) if not after.trains]
        if empty:
            self._complain(part, table, empty, len(rows))
        kept = [(example, row) for example, row in zip(examples, encoded, strict=True) if row.trains]
        cut = sum(len(row.input_ids) > self.length for row in whole)
        lines = [_size(part, [row for _, row in kept])]
        if cut:
            lines.append(f"{part}: {cut:,} of {len(rows):,} examples were cut to {self.length:,} tokens.")
        if empty:
            lines.append(f"{part}: {len(empty):,} of {len(rows):,} examples were dropped, with nothing to learn.")
        self._warn_of_control_tokens(part, table, rows, examples)
        return Part([example for example, _ in kept], [row for _, row in kept], lines)

    def task_data(self, train: Part | None, evaluation: Part | None, report: list[str]) -> TaskData:
        """The parts as the trainer takes them."""
        lines = [line for part in (train, evaluation) if part is not None for line in part.lines]
        return TaskData(
            task="causal-lm",
            train=train.dataset() if train is not None else to_dataset([], []),
            evaluation=evaluation.dataset() if evaluation is not None else None,
            labels=[],
            collate=Collator.of(self.tokenizer),
            report=report + lines,
            prompts=self._prompts(evaluation) if evaluation is not None else [],
            max_length=self.length,
            separator=self.layout.separator,
        )

    def _draft(self, example: Example) -> Draft:
        if example.messages is not None:
            return chat_draft(example.messages, self.tokenizer, self.everything, self.length)
        if self.layout.format == "prompt-completion" and self.tokenizer.chat_template:
            return chat_draft(_as_messages(example), self.tokenizer, self.everything, self.length)
        prompt = example.prompt + self.layout.separator if example.prompt else ""
        text = prompt + example.completion
        return Draft(text, [(len(prompt), len(text))], specials=True, stop=True)

    def _complain(self, part: str, table: Table, empty: Sequence[int], count: int) -> None:
        what = (
            f"{part}: within {self.length:,} tokens, {len(empty):,} of {count:,} examples have no token to train on, "
            f"all labels being masked: {table.places(empty)}. "
        )
        fix = "Raise data.max_length, shorten the prompts, or set data.train_on to all."
        if len(empty) == count:
            raise DataError(what + fix)
        warnings.warn(what + "They are dropped. " + fix, VeneerWarning, stacklevel=4)

    def _warn_of_control_tokens(
        self, part: str, table: Table, rows: Sequence[int], examples: Sequence[Example]
    ) -> None:
        """A turn's end in the middle of a text would end it there; plain text may have them on purpose."""
        if self.layout.format == "text":
            return
        specials = [token for token in self.tokenizer.all_special_tokens if token]
        texts = [
            "\n".join(str(message.get("content", "")) for message in example.messages)
            if example.messages is not None
            else example.prompt + "\n" + example.completion
            for example in examples
        ]
        found = [row for row, text in zip(rows, texts, strict=True) if any(token in text for token in specials)]
        if found:
            warnings.warn(
                f"{part}: {len(found):,} examples hold special tokens of the model ({', '.join(specials[:4])}): "
                f"{table.places(found)}. They are read as the tokens themselves; remove them if they are not meant so.",
                VeneerWarning,
                stacklevel=4,
            )

    def _prompts(self, part: Part) -> list[Prompt]:
        prompts = []
        for example, row in zip(part.examples, part.encoded, strict=True):
            if self.layout.format == "text":
                size = max(1, min(TEXT_PROMPT, len(row.input_ids) // 2))
                head, tail = (
                    str(self.tokenizer.decode(ids, skip_special_tokens=True))
                    for ids in (row.input_ids[:size], row.input_ids[size:])
                )
                prompts.append(Prompt(head, tail, row.input_ids[:size]))
                continue
            if not 0 < row.answer < min(self.length, len(row.input_ids)):
                continue  # the answer was cut off, or has nothing before it
            messages = example.messages
            if messages is None and self.tokenizer.chat_template:
                messages = _as_messages(example)
            if messages is None:
                prompts.append(Prompt(example.prompt, example.completion, row.input_ids[: row.answer]))
                continue
            last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
            before, answer = messages[:last], messages[last].get("content", "")
            prompts.append(Prompt(in_words(before), answer, row.input_ids[: row.answer], before))
        return prompts


def _as_messages(example: Example) -> list[dict[str, str]]:
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]


def _size(part: str, rows: Sequence[Encoded]) -> str:
    tokens = sum(len(row.input_ids) for row in rows)
    trained = sum(label != IGNORED for row in rows for label in row.labels)
    return (
        f"{part}: {len(rows):,} examples, {tokens:,} tokens, {trained:,} of them trained on ({trained / tokens:.0%})."
    )
