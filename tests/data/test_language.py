"""Language modelling: formats and how they are found, what is trained, what is cut, and prompts to generate from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from veneer.data import TaskData, encode_prompts, load_evaluation, load_task
from veneer.data.batches import IGNORED
from veneer.errors import ConfigError, DataError, VeneerWarning
from veneer.options import DataOptions

Write = Callable[[str, str | bytes], str]
Make = Callable[..., PreTrainedTokenizerFast]
Load = Callable[..., TaskData]

PAIRS = [{"prompt": f"Question {i}:", "completion": f" Answer {i}"} for i in range(10)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Question {i}"},
            {"role": "assistant", "content": f"Answer {i}"},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": f"How are you {i}"},
        ]
    }
    for i in range(10)
]
TEXTS = [{"text": f"The film was great {i}"} for i in range(10)]


@pytest.fixture
def load(write: Write, make_tokenizer: Make) -> Load:
    """Writes rows as jsonl and loads them as a language-modelling task."""

    def load_rows(
        rows: Sequence[dict[str, Any]], template: str = "plain", validation: Any = None, seed: int = 0, **options: Any
    ) -> TaskData:
        train = write("train.jsonl", "\n".join(map(json.dumps, rows)))
        held = None if validation is None else write("held.jsonl", "\n".join(map(json.dumps, validation)))
        options.setdefault("validation_share", 0.0)
        tokenizer = make_tokenizer(template, options.pop("kind", "byte-level"), options.pop("bos", False))
        return load_task(DataOptions(train=train, validation=held, **options), "causal-lm", tokenizer, seed)

    return load_rows


def failure(load: Load, *args: Any, error: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(*args, **options)
    return str(caught.value)


def shown(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    """An example with what is trained in brackets."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    pieces = [(learnt, list(run)) for learnt, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED)]
    texts = [(learnt, str(tokenizer.decode([token for token, _ in run]))) for learnt, run in pieces]
    return "".join(f"[{text}]" if learnt else text for learnt, text in texts)


# Formats


def test_prompt_and_completion(load: Load, make_tokenizer: Make) -> None:
    data = load(PAIRS)
    assert data.train.column_names == ["input_ids", "labels"]
    assert shown(data.train[3], make_tokenizer()) == "Question 3:[ Answer 3</s>]"
    assert data.labels == []
    assert "prompt-completion in 'prompt', 'completion'" in data.report[0]
    assert "no chat template: prompt, '' and completion are joined" in data.report[1]


def test_prompt_and_completion_in_the_chat_template(load: Load, make_tokenizer: Make) -> None:
    data = load([{"prompt": "Hello", "completion": "Hi"}], "chatml")
    assert shown(data.train[0], make_tokenizer("chatml")) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[Hi<|im_end|>]\n"
    )
    assert "as user and assistant" in data.report[1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("instruction", "output"), "Add.\n[Three.</s>]"),
        (("Instruction", "Response"), "Add.\n[Three.</s>]"),
        (("question", "answer"), "Add.\n[Three.</s>]"),
        (("prompt", "response"), "Add.[Three.</s>]"),
    ],
)
def test_other_names_of_pairs(load: Load, make_tokenizer: Make, names: tuple[str, str], expected: str) -> None:
    data = load([dict(zip(names, ("Add.", "Three."), strict=True))])
    assert shown(data.train[0], make_tokenizer()) == expected
    assert data.separator == ("" if "prompt" in names else "\n")


def test_alpaca(load: Load, make_tokenizer: Make) -> None:
    data = load(
        [
            {"instruction": "Add.", "input": "one two", "output": "Three."},
            {"instruction": "Say Hello.", "input": "", "output": "Hello"},
            {"instruction": "Say Hello.", "input": None, "output": "Hello"},
        ]
    )
    assert shown(data.train[0], make_tokenizer()) == "Add.\n\none two\n[Three.</s>]"
    assert shown(data.train[1], make_tokenizer()) == shown(data.train[2], make_tokenizer()) == "Say Hello.\n[Hello</s>]"


def test_chat(load: Load, make_tokenizer: Make) -> None:
    expected = (
        "<|im_start|>user\nQuestion 0<|im_end|>\n<|im_start|>assistant\n[Answer 0<|im_end|>]\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[How are you 0<|im_end|>]\n"
    )
    assert shown(load(CHATS, "chatml").train[0], make_tokenizer("chatml")) == expected
    names = {"user": "human", "assistant": "gpt"}
    shared = [
        {
            "conversations": [
                {"from": names[message["role"]], "value": message["content"]} for message in row["messages"]
            ]
        }
        for row in CHATS
    ]
    assert shown(load(shared, "chatml").train[0], make_tokenizer("chatml")) == expected


def test_plain_text(load: Load, make_tokenizer: Make) -> None:
    data = load(TEXTS)
    # The first token is predicted by nothing, so it carries no loss.
    assert shown(data.train[0], make_tokenizer()).replace("[", "") == "The film was great 0</s>]"
    assert data.train[0]["labels"] == [IGNORED, *data.train[0]["input_ids"][1:]]
    assert "Plain text has no prompt, so all of it is trained on." in data.report
    assert load([{"words": "one two"}]).report[0].endswith("text in 'words'.")
    assert shown(load(TEXTS, bos=True).train[0], make_tokenizer(bos=True)) == "<s>[The film was great 0</s>]"


def test_plain_text_is_not_put_in_a_template(load: Load, make_tokenizer: Make) -> None:
    assert shown(load(TEXTS, "chatml").train[0], make_tokenizer("chatml")).endswith("film was great 0<|im_end|>]")


def test_train_on_all(load: Load, make_tokenizer: Make) -> None:
    row = load(CHATS, "chatml", train_on="all").train[0]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    assert load(PAIRS, train_on="all").prompts == []


def test_named_columns(load: Load, make_tokenizer: Make) -> None:
    rows = [{"q": "one", "a": " two", "text": "x", "talk": CHATS[0]["messages"]}]
    assert shown(load(rows, text_column="q", label_column="a").train[0], make_tokenizer()) == "one[ two</s>]"
    assert load(rows, text_column="q").report[0].endswith("text in 'q'.")
    assert load(rows, "chatml", text_column="talk").report[0].endswith("chat in 'talk'.")
    assert load(rows, "chatml", text_column="talk", format="chat").report[1] == "Columns not used: q, a, text."


def test_format_chooses_between_columns(load: Load) -> None:
    rows = [{"text": "one", **PAIRS[0]}]
    message = failure(load, rows)
    assert "several ways: prompt-completion (prompt, completion); text (text). Choose with --data.format" in message
    assert "text in 'text'" in load(rows, format="text").report[0]
    assert "prompt-completion in" in load(rows, format="prompt-completion").report[0]
    assert "several ways" in failure(load, [{**PAIRS[0], "response": "x"}])
    assert "text in 'content'" in load([{"content": "one", "b": "two"}], format="text").report[0]


def test_no_format_fits(load: Load) -> None:
    message = failure(load, [{"a": "one", "b": 3, "c": "x"}])
    assert "several columns may be the text: a, c" in message
    message = failure(load, [{"a": 1, "b": 2}])
    assert "the columns a, b are not those of a language-modelling data set (data.format auto)" in message
    assert "prompt and completion" in message
    assert "data.format chat" in failure(load, PAIRS, format="chat")


def test_columns_that_contradict_the_format(load: Load) -> None:
    assert "needs data.text_column" in failure(load, PAIRS, label_column="completion", error=ConfigError)
    message = failure(load, PAIRS, format="text", text_column="prompt", label_column="completion", error=ConfigError)
    assert "(given: text)" in message
    message = failure(load, PAIRS, format="prompt-completion", text_column="prompt", error=ConfigError)
    assert "data.label_column" in message
    assert "no column 'x'" in failure(load, PAIRS, text_column="x")


# Rows


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize("value", [None, " ", ""])
def test_empty_rows_are_named(load: Load, column: str, value: str | None) -> None:
    rows = [*PAIRS[:2], {**PAIRS[2], column: value}]
    assert f"Column '{column}' is empty in 1 of 3 rows: " in failure(load, rows)
    assert "train.jsonl, line 3" in failure(load, rows)


def test_rows_that_are_no_conversation(load: Load) -> None:
    rows = [
        CHATS[0],
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "y"}]},
    ]
    message = failure(load, rows, "chatml")
    assert "Column 'messages' is no conversation in 3 of 4 rows" in message
    assert "line 2: expected a list of messages" in message
    assert "line 3; line 4: no message is the assistant's" in message.replace("train.jsonl, ", "")


def test_a_template_that_breaks_names_the_row(load: Load) -> None:
    assert "train.jsonl, line 1: the chat template writes message 2 differently" in failure(load, CHATS, "broken")
    row = load(CHATS, "broken", train_on="all").train[0]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    assert "Only user and assistant" in failure(
        load, [{"messages": [{"role": "system", "content": "x"}, *CHATS[0]["messages"]]}], "llama2"
    )


def test_chat_without_a_template(load: Load) -> None:
    assert "no chat template. Use an instruction-tuned model" in failure(load, CHATS)


def test_special_tokens_within_texts(load: Load) -> None:
    rows = [CHATS[0], {"messages": [*CHATS[1]["messages"][:3], {"role": "assistant", "content": "a<|im_end|>b"}]}]
    with pytest.warns(VeneerWarning, match=r"1 examples hold special tokens .*line 2"):
        load(rows, "chatml")


# Length


def test_long_examples_are_cut_and_counted(load: Load, make_tokenizer: Make) -> None:
    rows = [*PAIRS[:2], {"prompt": "One:", "completion": " two" * 30}]
    data = load(rows, max_length=20)
    assert [len(row) <= 20 for row in data.train["input_ids"]] == [True] * 3
    assert "Training: 1 of 3 examples were cut to 20 tokens." in data.report
    assert make_tokenizer().eos_token_id not in data.train[2]["input_ids"]


def test_examples_without_a_trained_token_are_dropped_with_a_warning(load: Load) -> None:
    rows = [*PAIRS[:2], {"prompt": "one " * 30, "completion": "two"}]
    with pytest.warns(VeneerWarning, match=r"within 20 tokens, 1 of 3 .* masked: .*line 3\. They are dropped\. Raise"):
        data = load(rows, max_length=20)
    assert len(data.train) == 2
    assert "Training: 1 of 3 examples were dropped, with nothing to learn." in data.report


def test_all_labels_masked(load: Load) -> None:
    message = failure(load, PAIRS, max_length=3)
    assert "within 3 tokens, 10 of 10 examples have no token to train on" in message
    assert "line 1; line 2; line 3; line 4; line 5 (and 5 more)" in message
    assert "Raise data.max_length" in message


# Splits


def test_split_and_limits(load: Load) -> None:
    data = load(PAIRS, validation_share=0.3)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation)) == (7, 3)
    assert "Held out 3 of the rows, chosen with seed 0." in data.report
    limited = load(PAIRS, validation_share=0.3, limit=2, validation_limit=1)
    assert limited.evaluation is not None
    assert (len(limited.train), len(limited.evaluation)) == (2, 1)
    assert limited.evaluation[0] in data.evaluation.to_list()
    assert load(PAIRS, validation_share=0.3, seed=1).train.to_list() != data.train.to_list()


def test_validation_file(load: Load) -> None:
    data = load(PAIRS, validation=PAIRS[:2])
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation)) == (10, 2)
    assert "no column 'prompt' (a column of the training data)" in failure(load, PAIRS, validation=TEXTS)


def test_evaluation_reads_everything(write: Write, make_tokenizer: Make) -> None:
    path = write("a.jsonl", "\n".join(map(json.dumps, PAIRS)))
    data = load_evaluation(DataOptions(train=path), "causal-lm", make_tokenizer(), 0)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation), len(data.prompts)) == (0, 10, 10)


def test_the_report_counts_tokens(load: Load) -> None:
    (line,) = [line for line in load(PAIRS[:1]).report if line.startswith("Training: ")]
    row = load(PAIRS[:1]).train[0]
    learnt = sum(label != IGNORED for label in row["labels"])
    assert line.startswith(f"Training: 1 examples, {len(row['input_ids'])} tokens, {learnt} of them trained on (")


# Prompts


def test_prompts_of_pairs(load: Load, make_tokenizer: Make) -> None:
    (prompt,) = load(PAIRS, validation=[{"prompt": "One:", "completion": " two"}], bos=True).prompts
    assert (prompt.text, prompt.expected, prompt.messages) == ("One:", " two", None)
    assert prompt.input_ids == encode_prompts(["One:"], make_tokenizer(bos=True))[0]
    assert make_tokenizer(bos=True).decode(prompt.input_ids) == "<s>One:"


def test_prompts_of_pairs_with_a_separator(load: Load, make_tokenizer: Make) -> None:
    data = load([{"question": "One", "answer": "two"}] * 2, validation=[{"question": "One", "answer": "two"}])
    assert data.prompts[0].input_ids == encode_prompts(["One"], make_tokenizer(), data.separator)[0]


def test_prompts_in_the_template(load: Load, make_tokenizer: Make) -> None:
    (prompt,) = load(PAIRS, "chatml", validation=[{"prompt": "One", "completion": "two"}]).prompts
    assert (prompt.text, prompt.expected) == ("One", "two")
    assert prompt.input_ids == encode_prompts(["One"], make_tokenizer("chatml"))[0]


def test_prompts_of_conversations_stop_before_the_last_answer(load: Load, make_tokenizer: Make) -> None:
    prompt = load(CHATS, "chatml", validation=CHATS[:1]).prompts[0]
    assert prompt.messages == CHATS[0]["messages"][:3]
    assert prompt.expected == "How are you 0"
    assert prompt.text == "user: Question 0\nassistant: Answer 0\nuser: Hello"
    assert prompt.input_ids == encode_prompts([prompt.messages], make_tokenizer("chatml"))[0]


def test_prompts_of_plain_text_are_its_beginning(load: Load) -> None:
    prompt = load(TEXTS, validation=[{"text": "one two three four five six"}]).prompts[0]
    assert prompt.text + prompt.expected == "one two three four five six"
    assert prompt.text.startswith("one two")


def test_no_prompt_of_an_example_whose_answer_was_cut_off(load: Load) -> None:
    held = [PAIRS[0], {"prompt": "One " * 30, "completion": "two"}]
    assert len(load(PAIRS, validation=held, max_length=20, train_on="all").prompts) == 1


def test_prompts_to_predict_from(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    messages = [{"role": "user", "content": "One"}]
    assert encode_prompts(["One", messages], tokenizer)[0] == encode_prompts([messages], tokenizer)[0]
    assert str(tokenizer.decode(encode_prompts(["One"], tokenizer)[0])).endswith("<|im_start|>assistant\n")
    with pytest.raises(DataError, match="Prompt 2 is empty"):
        encode_prompts(["One", " "], tokenizer)
    with pytest.raises(DataError, match="Prompt 1: the chat template refuses"):
        encode_prompts([[{"role": "system", "content": "x"}]], make_tokenizer("llama2"))
    short = make_tokenizer("plain")
    limit, short.model_max_length = short.model_max_length, 4
    try:
        with pytest.raises(DataError, match="and the model takes 4 with the answer"):
            encode_prompts(["one two three four five"], short)
    finally:
        short.model_max_length = limit
