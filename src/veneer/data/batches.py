"""What a task hands to the trainer: encoded examples, and how they become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from veneer.options import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# The label that torch's cross entropy passes over: no loss at this token.
IGNORED = -100


@dataclass(frozen=True)
class Collator:
    """Pads examples to the longest of the batch. A class, not a closure, so that loader processes can pickle it.

    Args:
        pad_token_id: Fills `input_ids`; a classification model's `config.pad_token_id` must be the same, for models
            without a first token read the class off the last one that is not padding.
        side: `right` or `left`, as the tokenizer pads.
    """

    pad_token_id: int
    side: str = "right"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """The padding that a tokenizer prescribes."""
        # Tokenizers without a pad token (GPT-2, Llama) pad with the end of text. The attention mask is built from
        # lengths, not from ids, and padding has no label, so a true end of text is still seen and learnt.
        choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
        pad = next(choice for choice in choices if choice is not None)
        return cls(int(pad), tokenizer.padding_side)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Input ids, attention mask and, where the examples have them, labels, each (batch, longest) or (batch,)."""
        import torch

        longest = max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": torch.tensor([self._pad(e["input_ids"], self.pad_token_id, longest) for e in examples]),
            "attention_mask": torch.tensor([self._pad([1] * len(e["input_ids"]), 0, longest) for e in examples]),
        }
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            if not isinstance(labels[0], int):
                labels = [self._pad(row, IGNORED, longest) for row in labels]
            batch["labels"] = torch.tensor(labels)
        return batch

    def _pad(self, row: Sequence[int], value: int, length: int) -> list[int]:
        padding = [value] * (length - len(row))
        return [*padding, *row] if self.side == "left" else [*row, *padding]


@dataclass(frozen=True)
class Prompt:
    """A held-out example to generate from, before and after training.

    Args:
        text: The prompt as a person reads it, without the template's tokens.
        expected: The answer in the data.
        input_ids: The prompt as the model is given it, exactly as it stands at the head of the training example.
        messages: The conversation up to the answer, where a chat template was used.
    """

    text: str
    expected: str
    input_ids: list[int]
    messages: list[dict[str, Any]] | None = None


@dataclass
class TaskData:
    """Everything that a training run needs of its data.

    Args:
        task: What is learnt.
        train: Columns `input_ids` and `labels` (a class number, or a list as long as `input_ids`).
        evaluation: The held-out examples likewise; none if nothing is held out.
        labels: Class names in the order of their numbers; empty for language modelling.
        collate: Turns examples into a padded batch.
        report: Lines that say what was read, chosen, cut and dropped.
        prompts: Language modelling: the held-out examples to generate from.
        max_length: Longest sequence in tokens that was allowed, after the model's own limit.
        separator: Stands between prompt and completion where no chat template is used.
    """

    task: Task
    train: Dataset
    evaluation: Dataset | None
    labels: list[str]
    collate: Collator
    report: list[str]
    prompts: list[Prompt] = field(default_factory=list)
    max_length: int = 0
    separator: str = ""


def to_dataset(input_ids: Sequence[Sequence[int]], labels: Sequence[int] | Sequence[Sequence[int]]) -> Dataset:
    """An in-memory data set; 32-bit, for token ids fit and texts are many."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    tokens = pa.list_(pa.int32())
    kind = pa.int64() if labels and isinstance(labels[0], int) else tokens
    columns = {"input_ids": pa.array(input_ids, tokens), "labels": pa.array(labels, kind)}
    return Dataset(InMemoryTable(pa.table(columns)))


def usable_length(max_length: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """The wanted length, or the model's own limit with a line that says so, if that is less."""
    limit = tokenizer.model_max_length
    if limit >= max_length:
        return max_length, []
    return int(limit), [f"max_length {max_length:,} is more than the model takes; {limit:,} tokens are used."]


def batched(items: Sequence[Any], size: int = 1000) -> list[Sequence[Any]]:
    """Slices that a tokenizer takes at once: it works on them in parallel, and the lists stay short."""
    return [items[start : start + size] for start in range(0, len(items), size)]
