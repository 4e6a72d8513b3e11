"""Classification: which columns, which labels, which rows, which tokens; and everything that may be wrong with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from veneer.data import TaskData, display_name, encode_texts, load_evaluation, load_task
from veneer.data.classification import label_name, order_labels
from veneer.errors import ConfigError, DataError, VeneerWarning
from veneer.options import DataOptions

Write = Callable[[str, str | bytes], str]
Load = Callable[..., TaskData]

WORDS = (
    "the film was great and acting even better a dull slow utterly predictable hello there how".split()  # noqa: SIM905
)


@pytest.fixture
def load(write: Write, encoder_tokenizer: PreTrainedTokenizerFast) -> Load:
    """Writes rows (dictionaries, or a csv file's text) and loads them as a classification task."""

    def load_rows(rows: Any, validation: Any = None, seed: int = 0, **options: Any) -> TaskData:
        train = source(write, "train", rows)
        held = None if validation is None else source(write, "held", validation)
        options.setdefault("max_length", 16)
        return load_task(
            DataOptions(train=train, validation=held, **options), "classification", encoder_tokenizer, seed
        )

    return load_rows


def source(write: Write, name: str, rows: Any) -> str:
    if isinstance(rows, str):
        return write(f"{name}.csv", rows)
    return write(f"{name}.jsonl", "\n".join(map(json.dumps, rows)))


def reviews(count: int, text: str = "text", label: str = "label", classes: tuple[Any, ...] = ("neg", "pos")) -> Any:
    """Rows of different texts, with the classes in turn."""
    return [
        {text: f"{WORDS[i % 16]} {WORDS[i // 16 % 16]} film", label: classes[i % len(classes)]} for i in range(count)
    ]


def failure(load: Load, rows: Any, *args: Any, error: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(rows, *args, **options)
    return str(caught.value)


def test_examples_are_tokens_and_class_numbers(load: Load, encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    data = load("text,label\nThe film was great,pos\nA dull film,neg\n", validation_share=0.0)
    assert data.labels == ["neg", "pos"]
    assert data.evaluation is None
    assert data.train.column_names == ["input_ids", "labels"]
    assert data.train["labels"][:] == [1, 0]
    assert encoder_tokenizer.decode(data.train[0]["input_ids"]) == "[CLS] the film was great [SEP]"
    assert data.prompts == []
    assert data.task == "classification"


def test_split_is_stratified_and_seeded(load: Load) -> None:
    rows = reviews(100, classes=("a", "a", "a", "b"))
    data = load(rows, validation_share=0.2)
    assert (len(data.train), len(data.evaluation or [])) == (80, 20)
    assert data.evaluation is not None
    assert Counter(data.evaluation["labels"]) == {0: 15, 1: 5}
    again, other = load(rows, validation_share=0.2).evaluation, load(rows, validation_share=0.2, seed=1).evaluation
    assert again is not None
    assert other is not None
    assert data.evaluation.to_list() == again.to_list()
    assert data.evaluation.to_list() != other.to_list()


def test_limits_are_stratified_and_do_not_change_what_is_held_out(load: Load) -> None:
    rows = reviews(100)
    whole, part = load(rows, validation_share=0.5), load(rows, validation_share=0.5, limit=10, validation_limit=8)
    assert whole.evaluation is not None
    assert part.evaluation is not None
    assert (len(part.train), len(part.evaluation)) == (10, 8)
    assert Counter(part.train["labels"]) == {0: 5, 1: 5}
    assert all(row in whole.evaluation.to_list() for row in part.evaluation.to_list())


def test_a_class_of_one_example_stays_in_training(load: Load) -> None:
    data = load([*reviews(20), {"text": "hello there", "label": "rare"}])
    assert data.evaluation is not None
    assert Counter(data.train["labels"])[2] == 1
    assert Counter(load([*reviews(20), {"text": "hello", "label": "rare"}], limit=4).train["labels"])[2] == 1


def test_validation_file(load: Load) -> None:
    data = load(reviews(6), [{"label": "pos", "text": "hello there", "other": 1}])
    assert (len(data.train), data.evaluation and data.evaluation["labels"][:]) == (6, [1])


# Columns


@pytest.mark.parametrize("text", ["text", "Sentence", "review", "content", "TWEET"])
@pytest.mark.parametrize("label", ["label", "Labels", "category", "target", "sentiment"])
def test_usual_columns_are_found(load: Load, text: str, label: str) -> None:
    data = load([{"id": f"row {i} here", **row} for i, row in enumerate(reviews(10, text, label))])
    assert f"text in '{text}', label in '{label}'" in data.report[0]
    assert data.report[1] == "Columns not used: id."


def test_columns_are_found_by_their_values(load: Load) -> None:
    data = load([{"number": str(i / 7), **row} for i, row in enumerate(reviews(10, "words", "kind"))])
    assert "text in 'words', label in 'kind'" in data.report[0]
    assert "text in 'words', label in 'kind'" in load(reviews(10, "words", "kind", (0, 1))).report[0]


def test_named_columns(load: Load) -> None:
    rows = [{"a": row["text"], "b": row["label"], "text": "x y", "label": 1} for row in reviews(10)]
    assert "text in 'a', label in 'b'" in load(rows, text_column="a", label_column="b").report[0]


def test_named_column_that_is_missing(load: Load) -> None:
    message = failure(load, reviews(4), text_column="txt")
    assert "has no column 'txt' (--data.text_column). Did you mean 'text'? Its columns are: text, label." in message
    assert "no column 'labl' (--data.label_column). Did you mean" in failure(load, reviews(4), label_column="labl")
    assert "both text and label" in failure(load, reviews(4), text_column="text", label_column="text")


def test_ambiguous_columns(load: Load) -> None:
    rows = [{"sentence": "a b", **row} for row in reviews(10)]
    message = failure(load, rows)
    assert "several columns may be the text: sentence, text" in message
    assert "--data.text_column sentence (all columns: sentence, text, label)" in message
    rows = [{"class": "a", **row} for row in reviews(10)]
    assert "several columns may be the label: class, label" in failure(load, rows)
    rows = [{"one": f"{i} words", "two": f"{i} more", "kind": i % 2} for i in range(10)]
    assert "several columns may be the text: one, two" in failure(load, rows)
    rows = [{"text": f"{i} words", "one": i % 2, "two": i % 3} for i in range(10)]
    assert "several columns may be the label: one, two" in failure(load, rows)


def test_no_fitting_column(load: Load) -> None:
    message = failure(load, "1.5,good film\n2.5,bad film\n3.5,dull film\n4,other film\n5,x film\n")
    assert "no column looks like the label. Its columns are: 1.5, good film" in message
    assert "add a first line with the names" in message
    assert "no column looks like the text" in failure(load, [{"a": i, "label": i % 2} for i in range(9)])


def test_validation_file_without_the_columns(load: Load) -> None:
    message = failure(load, reviews(4), [{"text": "a", "labels": "pos"}])
    assert "no column 'label' (the label column of the training data). Did you mean 'labels'?" in message


# Labels


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("b_c", "a"), ["a", "b_c"]),
        ((10, 9, 2), ["2", "9", "10"]),
        (("10", "9", "-1"), ["-1", "9", "10"]),
        ((True, False), ["false", "true"]),
        ((1.0, 0.0), ["0", "1"]),
        ((" pos", "pos ", "neg"), ["neg", "pos"]),
        (("1", "many"), ["1", "many"]),
    ],
)
def test_label_names_and_their_order(load: Load, given: tuple[Any, ...], names: list[str]) -> None:
    assert load(reviews(12, classes=given)).labels == names


def test_declared_class_names(tmp_path: Path, encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "unused", "neg"])})
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": ["a film", "a dull film", "film"], "label": [0, 2, 2]}, features).to_parquet(path)
    options = DataOptions(train=str(path), validation_share=0)
    data = load_task(options, "classification", encoder_tokenizer, 0)
    assert data.labels == ["pos", "neg"]
    assert data.train["labels"][:] == [0, 1, 1]
    Dataset.from_dict({"text": ["a film", "a dull film"], "label": [0, -1]}, features).to_parquet(path)
    with pytest.raises(DataError, match=r"Column 'label' is empty in 1 of 2 rows: .*a\.parquet, row 2"):
        load_task(options, "classification", encoder_tokenizer, 0)


def test_labels_that_are_none(load: Load) -> None:
    rows = [{**row, "label": 0.5 if i == 2 else i % 2} for i, row in enumerate(reviews(4))]
    message = failure(load, rows)
    assert "train.jsonl, line 3: column 'label' has the number 0.5" in message
    assert "numbers on a scale" in message
    rows = [{**row, "label": ["a", "b"]} for row in reviews(4)]
    assert "line 1: column 'label' has the list ['a', 'b']. Expected one class" in failure(load, rows)


def test_one_class_only(load: Load) -> None:
    message = failure(load, reviews(4, classes=("pos",)))
    assert "all 4 rows have the label 'pos' (column 'label')" in message
    assert "at least two classes" in message


def test_unseen_labels(load: Load) -> None:
    held = [{"text": "a", "label": label} for label in ("pos", "odd", "neg", "odd", "new")]
    message = failure(load, reviews(4), held)
    assert "labels unseen in training: 'new' at " in message
    assert "held.jsonl, line 5; 'odd' at " in message
    assert "held.jsonl, line 2; line 4. Training has: neg, pos" in message


def test_labels_that_may_be_a_mistake(load: Load) -> None:
    with pytest.warns(VeneerWarning, match=r"differ only in upper and lower case.*: Pos, pos\."):
        load(reviews(12, classes=("pos", "Pos", "neg")))
    with pytest.warns(VeneerWarning, match="has 13 different labels in 24 rows. Is it the label"):
        load(reviews(24, classes=tuple(f"c{i}" for i in range(13))))


def test_limit_below_the_number_of_classes(load: Load) -> None:
    assert "there are 3 classes" in failure(load, reviews(9, classes=(1, 2, 3)), limit=2, error=ConfigError)


def test_too_few_rows_to_split(load: Load) -> None:
    message = failure(load, reviews(2))
    assert "Nothing can be held out" in message
    assert "data.validation_share to 0" in message


# Texts


def test_empty_rows_are_named(load: Load) -> None:
    message = failure(load, "text,label\na,x\n,y\n  ,x\nb,y\n" + ",x\n" * 5)
    assert "Column 'text' is empty in 7 of 9 rows" in message
    assert "train.csv, line 3; line 4; line 6; line 7; line 8 (and 2 more)" in message
    assert "remove these rows" in message
    assert "Column 'label' is empty in 1 of 2 rows: " in failure(load, "text,label\na film,x\nb film,\n")
    assert "Column 'text' is empty in 1 of 3 rows" in failure(load, [*reviews(2), {"label": "pos"}])
    held = [{"text": None, "label": "pos"}]
    assert "held.jsonl, line 1" in failure(load, reviews(4), held)


def test_texts_that_are_none(load: Load) -> None:
    rows = [{"text": i, "label": i % 2} for i in range(4)]
    assert "train.jsonl, line 1: column 'text' has the number 0. Expected a text" in failure(load, rows)


def test_texts_without_a_token(write: Write) -> None:
    from tokenizers import Tokenizer, models

    letters = models.BPE({letter: number for number, letter in enumerate("film")}, [])  # others vanish
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(letters))
    path = write("a.csv", "text,label\nfilm,x\nheard,y\nfilm,y\n")
    with pytest.raises(DataError, match=r"makes no token of the text at .*a\.csv, line 3"):
        load_task(DataOptions(train=path, validation_share=0), "classification", tokenizer, 0)


def test_long_texts_are_cut_and_counted(load: Load, encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "the film was great and even better", "label": "x"}, {"text": "dull", "label": "y"}]
    data = load(rows, max_length=5, validation_share=0)
    assert encoder_tokenizer.decode(data.train[0]["input_ids"]) == "[CLS] the film was [SEP]"
    assert "Training: 1 of 2 texts were cut to 5 tokens (data.max_length)." in data.report
    assert data.max_length == 5


def test_the_models_own_limit(load: Load) -> None:
    data = load(reviews(20), max_length=512)
    assert data.max_length == 16
    assert "max_length 512 is more than the model takes; 16 tokens are used." in data.report


def test_the_report(load: Load) -> None:
    rows = reviews(40, classes=("credit_card", "other"))
    report = load(rows, [{"text": "hello", "label": "credit_card"}]).report
    assert report[0].startswith("Read 40 rows from ")
    assert "Training: 40 examples (credit card 20 = 50%, other 20 = 50%)." in report
    assert "Held out: 1 examples (credit card 1 = 100%, other 0 = 0%)." in report


def test_held_out_texts_that_are_trained_on(load: Load) -> None:
    rows = reviews(10)
    fresh = {"text": "hello", "label": "pos"}
    assert "1 of 2 held-out texts also stand in the training data." in load(rows, [rows[0], fresh]).report
    with pytest.warns(VeneerWarning, match="Every held-out text is also a training text"):
        load(rows, rows[:2])


# Options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit": 0}, "data.limit is 0"),
        ({"validation_limit": -1}, "data.validation_limit is -1"),
        ({"validation_share": 1.0}, "data.validation_share is 1.0"),
        ({"max_length": 1}, "data.max_length is 1"),
        ({"format": "chat"}, "data.format is 'chat', which is for causal-lm"),
    ],
)
def test_options_without_sense(load: Load, options: dict[str, Any], expected: str) -> None:
    assert expected in failure(load, reviews(4), error=ConfigError, **options)


def test_unknown_task(encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="task is 'regression'"):
        load_task(DataOptions(train="x.csv"), "regression", encoder_tokenizer, 0)  # type: ignore[arg-type]


def test_evaluation_keeps_the_models_labels(write: Write, encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    options = DataOptions(train=source(write, "a", reviews(6)))
    data = load_evaluation(options, "classification", encoder_tokenizer, 0, ["pos", "other", "neg"])
    assert data.labels == ["pos", "other", "neg"]
    assert len(data.train) == 0
    assert data.evaluation is not None
    assert data.evaluation["labels"][:] == [2, 0] * 3
    with pytest.raises(DataError, match="labels unseen in training: 'pos' at"):
        load_evaluation(options, "classification", encoder_tokenizer, 0, ["neg", "other"])


def test_encode_texts(encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    examples, cut = encode_texts(["the film", "the film was great"], encoder_tokenizer, 5)
    assert [encoder_tokenizer.decode(row["input_ids"]) for row in examples] == [
        "[CLS] the film [SEP]",
        "[CLS] the film was [SEP]",
    ]
    assert cut == 1
    with pytest.raises(DataError, match="1 of 2 texts are empty: 2"):
        encode_texts(["a", " "], encoder_tokenizer, 5)


def test_names() -> None:
    assert display_name("very_good") == "very good"
    assert label_name(float("nan")) is None
    assert label_name("") == ""
    assert order_labels(["1e1", "9"]) == ["9", "1e1"]
