"""The entry points: a data set to what a trainer takes, and texts to what a trained model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.data.batches import TaskData
from veneer.data.chat import Message, render
from veneer.data.classification import encode, load_classification, load_labelled
from veneer.data.language import load_language, load_language_evaluation
from veneer.data.masking import first_tokens
from veneer.errors import ConfigError, DataError
from veneer.options import DataOptions, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_task(options: DataOptions, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Reads, checks, splits and encodes the data of a training run.

    Args:
        options: The section `data`.
        task: What is learnt.
        tokenizer: The base model's.
        seed: Chooses the held-out rows and those that a limit keeps.

    Raises:
        DataError: If the data cannot be read or used; names the rows.
        ConfigError: If the options contradict each other.
    """
    _check(options, task)
    load = load_classification if task == "classification" else load_language
    return load(options, tokenizer, seed)


def load_evaluation(
    options: DataOptions, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int, labels: Sequence[str] = ()
) -> TaskData:
    """Reads all of `options.train` as held-out data, to evaluate a model that is trained already.

    Args:
        options: The section `data`; nothing is split off, and of a divided source the validation or test part is read.
        task: What was learnt.
        tokenizer: The model's.
        seed: Chooses the rows that `limit` keeps.
        labels: Classification: the class names the model was trained with, in the order of its outputs.

    Returns:
        Task data whose `train` has no rows.

    Raises:
        DataError: As in `load_task`, and if a label is not among `labels`.
    """
    _check(options, task)
    if task == "classification":
        return load_labelled(options, tokenizer, seed, labels)
    return load_language_evaluation(options, tokenizer, seed)


def _check(options: DataOptions, task: Task) -> None:
    if task not in ("classification", "causal-lm"):
        raise ConfigError(f"task is {task!r}. Expected classification or causal-lm.")
    if task == "classification" and options.format != "auto":
        raise ConfigError(f"data.format is {options.format!r}, which is for causal-lm. Leave it out.")
    if not 0 <= options.validation_share < 1:
        raise ConfigError(
            f"data.validation_share is {options.validation_share}. Expected 0 (hold out nothing) to below 1."
        )
    for name, value in (("limit", options.limit), ("validation_limit", options.validation_limit)):
        if value is not None and value < 1:
            raise ConfigError(f"data.{name} is {value}. Expected at least 1, or none for all examples.")
    if options.preparation_batches < 1:
        raise ConfigError(f"data.preparation_batches is {options.preparation_batches}. Expected at least 1.")
    if options.max_length < 2:
        raise ConfigError(f"data.max_length is {options.max_length}. Expected at least 2 tokens.")


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Texts to classify, as examples for the collator, and how many of them were cut to `max_length` tokens.

    Raises:
        DataError: If a text is blank.
    """
    blank = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if blank:
        shown = ", ".join(map(str, blank[:5])) + (" and more" if len(blank) > 5 else "")
        raise DataError(f"{len(blank):,} of {len(texts):,} texts are empty: {shown}. There is nothing to classify.")
    ids, cut = encode(texts, tokenizer, max_length)
    return [{"input_ids": row} for row in ids], cut


def encode_prompts(
    prompts: Sequence[str | list[Message]], tokenizer: PreTrainedTokenizerBase, separator: str = ""
) -> list[list[int]]:
    """Prompts to generate from, written exactly as in training.

    Args:
        prompts: Texts, or conversations that end before the answer.
        tokenizer: With a chat template, a text becomes the user's message in it.
        separator: `TaskData.separator`, behind a prompt where there is no chat template.

    Raises:
        DataError: If a prompt is blank, refused by the template, or longer than the model takes.
    """
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise DataError(f"Prompt {number} is empty. Give a text to continue from.")
        if isinstance(prompt, str) and not tokenizer.chat_template:
            head = first_tokens(tokenizer)
            ids = tokenizer(prompt + separator, add_special_tokens=False, verbose=False)["input_ids"]
            ids = list(ids) if ids[: len(head)] == head else [*head, *ids]
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                text = render(messages, tokenizer, ask=True)
            except ValueError as error:
                raise DataError(f"Prompt {number}: {error}.") from error
            ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= tokenizer.model_max_length:
            raise DataError(
                f"Prompt {number} has {len(ids):,} tokens, and the model takes {tokenizer.model_max_length:,} with the "
                "answer. Shorten it."
            )
        encoded.append(ids)
    return encoded
