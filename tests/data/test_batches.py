"""Padding, the 32-bit tables, and how light the package is to import."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from veneer.data import Collator
from veneer.data.batches import IGNORED, to_dataset

Make = Callable[..., PreTrainedTokenizerFast]

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
    {"input_ids": [8], "labels": [IGNORED]},
]


def test_right_padding() -> None:
    batch = Collator(0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_left_padding() -> None:
    batch = Collator(0, "left")(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]


def test_class_numbers_and_examples_without_labels() -> None:
    batch = Collator(0)([{"input_ids": [1], "labels": 2}, {"input_ids": [1, 2], "labels": 0}])
    assert batch["labels"].tolist() == [2, 0]
    assert set(Collator(0)([{"input_ids": [1]}])) == {"input_ids", "attention_mask"}


def test_pad_token_and_side_of_the_tokenizer(make_tokenizer: Make, encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = make_tokenizer()
    assert Collator.of(tokenizer) == Collator(tokenizer.pad_token_id, tokenizer.padding_side)
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    without.padding_side = "left"
    assert Collator.of(without) == Collator(without.vocab["</s>"], "left")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert Collator.of(bare).pad_token_id == 0


def test_padding_with_the_end_of_text_keeps_a_true_end() -> None:
    batch = Collator(9)([{"input_ids": [5, 9], "labels": [IGNORED, 9]}, {"input_ids": [5, 6, 9], "labels": [1, 2, 9]}])
    assert batch["labels"][0].tolist() == [-100, 9, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 0]


def test_collators_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Collator(3, "left"))) == Collator(3, "left")


def test_data_sets_are_small_and_in_memory() -> None:
    rows = to_dataset([[1, 2]], [[IGNORED, 2]])
    assert rows[0] == {"input_ids": [1, 2], "labels": [IGNORED, 2]}
    assert rows.features["input_ids"].feature.dtype == "int32"
    assert rows.cache_files == []
    assert to_dataset([[1]], [3])[0] == {"input_ids": [1], "labels": 3}
    assert len(to_dataset([], [])) == 0


def test_a_trainers_loader_takes_them() -> None:
    from torch.utils.data import DataLoader

    rows = to_dataset([[1, 2], [3]], [[IGNORED, 2], [IGNORED]])
    (batch,) = DataLoader(rows, batch_size=2, collate_fn=Collator(0))
    assert batch["input_ids"].tolist() == [[1, 2], [3, 0]]


def test_importing_is_light() -> None:
    code = "import sys, veneer.data; print({'torch', 'transformers', 'datasets', 'pyarrow', 'rich'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("labels", [[0], [[IGNORED]]])
def test_one_token(labels: list[int] | list[list[int]]) -> None:
    row = to_dataset([[4]], labels)[0]
    assert Collator(0)([row])["attention_mask"].tolist() == [[1]]
