"""Which tokens are trained: by decoding exactly these, for each kind of template and tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from veneer.data.batches import IGNORED
from veneer.data.chat import chat_draft, conversation, in_words
from veneer.data.masking import Draft, Encoded, encode_drafts
from veneer.errors import UnsupportedError

Make = Callable[..., PreTrainedTokenizerFast]

USER, ANSWER = "What is the capital of France?", "The capital of France is Paris."
ONE_TURN = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
TWO_TURNS = [
    *ONE_TURN,
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "I am fine, thanks. 😀"},
]


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, everything: bool = False) -> Encoded:
    return encode_drafts([chat_draft(messages, tokenizer)], tokenizer, everything)[0]


def trained(row: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The trained stretches, decoded."""
    runs = groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [str(tokenizer.decode([token for token, _ in run])) for learnt, run in runs if learnt]


@pytest.mark.parametrize("kind", ["byte-level", "trimmed", "sentence-piece"])
@pytest.mark.parametrize("template", ["chatml", "chatml-system", "marked", "marked-without-stop"])
def test_each_answer_with_its_end_is_trained(make_tokenizer: Make, template: str, kind: str) -> None:
    tokenizer = make_tokenizer(template, kind)
    row = encode(TWO_TURNS, tokenizer)
    assert trained(row, tokenizer) == [f"{ANSWER}<|im_end|>", "I am fine, thanks. 😀<|im_end|>"]
    assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    text = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "trimmed", "sentence-piece"])
@pytest.mark.parametrize(("template", "end"), [("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")])
def test_turns_that_end_with_another_token(make_tokenizer: Make, template: str, end: str, kind: str) -> None:
    tokenizer = make_tokenizer(template, kind, bos=True)
    row = encode(TWO_TURNS, tokenizer)
    assert trained(row, tokenizer) == [f"{ANSWER}{end}", f"I am fine, thanks. 😀{end}"]
    assert row.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["byte-level", "trimmed", "sentence-piece"])
def test_llama2_turns(make_tokenizer: Make, kind: str) -> None:
    tokenizer = make_tokenizer("llama2", kind, bos=True)
    row = encode(TWO_TURNS, tokenizer)
    assert [piece.strip() for piece in trained(row, tokenizer)] == [f"{ANSWER} </s>", "I am fine, thanks. 😀 </s>"]
    # The template writes the first token of each turn; the tokenizer adds no second one.
    assert row.input_ids.count(tokenizer.bos_token_id) == 2
    assert row.input_ids[:2].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    "template", ["chatml", "chatml-system", "llama2", "llama3", "gemma", "marked", "thinking", "bare"]
)
@pytest.mark.parametrize("kind", ["byte-level", "trimmed", "sentence-piece"])
def test_the_prompt_is_the_one_of_generation(make_tokenizer: Make, template: str, kind: str) -> None:
    tokenizer = make_tokenizer(template, kind)
    # Where answers begin in the middle of a token, earlier ones are cut there, and generation does not know of them.
    messages = ONE_TURN if template == "bare" else TWO_TURNS
    row = encode(messages, tokenizer)
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert row.input_ids[: row.answer] == prompt


def test_a_system_turn_is_not_trained(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml-system")
    row = encode([{"role": "system", "content": "one two"}, *ONE_TURN], tokenizer)
    assert trained(row, tokenizer) == [f"{ANSWER}<|im_end|>"]
    assert "Be nice" in tokenizer.decode(encode(ONE_TURN, tokenizer).input_ids)


def test_a_conversation_that_ends_with_the_user(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    assert trained(encode(TWO_TURNS[:3], tokenizer), tokenizer) == [f"{ANSWER}<|im_end|>"]


def test_two_answers_in_a_row(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    row = encode([*ONE_TURN, {"role": "assistant", "content": "one"}], tokenizer)
    assert trained(row, tokenizer) == [f"{ANSWER}<|im_end|>", "one<|im_end|>"]


def test_answers_of_a_template_that_adds_an_empty_thought_to_the_last(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("thinking")
    row = encode(TWO_TURNS, tokenizer)
    assert trained(row, tokenizer) == [
        f"{ANSWER}<|im_end|>",
        "<think>\n\n</think>\n\nI am fine, thanks. 😀<|im_end|>",
    ]


def test_a_template_without_special_tokens_gets_an_end(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bare")
    row = encode(TWO_TURNS, tokenizer)
    assert trained(row, tokenizer) == [f"{ANSWER}\n", "I am fine, thanks. 😀\n</s>"]


def test_a_template_whose_prefixes_do_not_hold_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("broken")
    with pytest.raises(ValueError, match=r"writes message 2 differently once others follow.*data\.train_on to all"):
        chat_draft(ONE_TURN, tokenizer)


def test_a_template_that_refuses_says_why(make_tokenizer: Make) -> None:
    messages = [{"role": "system", "content": "one"}, *ONE_TURN]
    with pytest.raises(ValueError, match=r"refuses the conversation .*Only user and assistant roles are supported"):
        chat_draft(messages, make_tokenizer("llama2"))
    with pytest.raises(ValueError, match="refuses the conversation"):
        chat_draft([{"role": "user", "odd": "x"}, ONE_TURN[1]], make_tokenizer("marked"))


def test_an_answer_without_a_question_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(ValueError, match="begins with the assistant"):
        chat_draft(TWO_TURNS[1:], make_tokenizer("chatml"))


def test_turns_behind_the_cut_are_not_looked_for(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    messages = [{"role": role, "content": f"one two {i}"} for i in range(20) for role in ("user", "assistant")]
    whole = encode(messages, tokenizer)
    for length in (1, 20, 50, 200, len(whole.input_ids)):
        draft = chat_draft(messages, tokenizer, length=length)
        (row,) = encode_drafts([draft], tokenizer, False)
        assert row.cut(length).labels == whole.labels[:length]
        assert (row.answer >= length) == draft.partial or row.answer == whole.answer
    assert len(draft.spans) == 20
    assert len(chat_draft(messages, tokenizer, length=50).spans) < 5


def test_everything(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    row = encode(ONE_TURN, tokenizer, everything=True)
    assert row.labels == [IGNORED, *row.input_ids[1:]]
    assert tokenizer.decode(row.input_ids[row.answer :]) == f"{ANSWER}<|im_end|>\n"


def test_special_tokens_that_take_the_space_beside_them(make_tokenizer: Make) -> None:
    """As Phi-3's: `<|end|>` swallows the line break behind it, in training and in generation alike."""
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.add_tokens([AddedToken(name, rstrip=True, special=True) for name in ("<|answer|>", "<|end|>")])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ ('<|answer|>' if message['role'] == 'assistant' else 'user') + '\n' + "
        "message['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|answer|>\n' }}{% endif %}"
    )
    row = encode(TWO_TURNS, tokenizer)
    assert trained(row, tokenizer) == [f"{ANSWER}<|end|>", "I am fine, thanks. 😀<|end|>"]
    text = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


# Plain prompts


def plain(prompt: str, completion: str) -> Draft:
    text = prompt + completion
    return Draft(text, [(len(prompt), len(text))], specials=True, stop=True)


@pytest.mark.parametrize("kind", ["byte-level", "trimmed"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Question: one\nAnswer:", " two"), ("Question: one Answer: ", "two three"), ("cap", "ital"), ("a", "\n\n😀 é")],
)
def test_plain_prompt_and_completion(make_tokenizer: Make, kind: str, prompt: str, completion: str) -> None:
    tokenizer = make_tokenizer("plain", kind, bos=kind == "trimmed")
    (row,) = encode_drafts([plain(prompt, completion)], tokenizer, False)
    assert trained(row, tokenizer) == [f"{completion}</s>"]
    # The prompt is tokenised as it is in generation, also where its last word goes on in the completion.
    assert row.input_ids[: row.answer] == tokenizer(prompt)["input_ids"]
    assert row.input_ids.count(tokenizer.bos_token_id) == (kind == "trimmed")


def test_first_and_last_tokens_are_not_doubled(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("plain", bos=True)
    (row,) = encode_drafts([plain("<s>one", " two</s>")], tokenizer, False)
    assert row.input_ids.count(tokenizer.bos_token_id) == row.input_ids.count(tokenizer.eos_token_id) == 1
    assert trained(row, tokenizer) == [" two</s>"]


def test_the_first_token_is_never_trained(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("plain")
    (row,) = encode_drafts([plain("", "one two")], tokenizer, True)
    assert row.labels[0] == IGNORED
    assert row.labels[1:] == row.input_ids[1:]


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="Slow does not tell where its tokens stand"):
        encode_drafts([plain("a", "b")], Slow(), False)  # type: ignore[arg-type]


words = st.text(st.sampled_from("ab é😀\n\t.,<|>[]"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(words, words, st.sampled_from(["byte-level", "trimmed"]))
def test_any_plain_pair_is_cut_exactly(make_tokenizer: Make, prompt: str, completion: str, kind: str) -> None:
    tokenizer = make_tokenizer("plain", kind, bos=True)
    (row,) = encode_drafts([plain(prompt, completion)], tokenizer, False)
    assert tokenizer.decode(row.input_ids[row.answer :]) == completion + "</s>"
    assert row.input_ids[: row.answer] == tokenizer(prompt)["input_ids"]
    assert all(label == IGNORED for label in row.labels[: row.answer])
    assert row.labels[row.answer :] == row.input_ids[row.answer :]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(words, words).filter(lambda pair: all(map(str.strip, pair))), min_size=1, max_size=3),
    st.sampled_from(["chatml", "chatml-system", "marked", "marked-without-stop"]),
    st.sampled_from(["byte-level", "trimmed"]),
)
def test_any_conversation_is_masked_exactly(
    make_tokenizer: Make, turns: list[tuple[str, str]], template: str, kind: str
) -> None:
    tokenizer = make_tokenizer(template, kind)
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    expected = [f"{answer}<|im_end|>" for _, answer in turns]
    assert trained(encode(messages, tokenizer), tokenizer) == expected


# Conversations


def test_share_gpt_and_null_keys() -> None:
    value = [
        {"from": "system", "value": ""},
        {"from": "human", "value": "one", "weight": None},
        {"from": "gpt", "value": "two"},
    ]
    assert conversation(value) == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
    ]


def test_tool_calls_need_no_content() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    messages = conversation([ONE_TURN[0], calls, {"role": "tool", "content": "3"}, ONE_TURN[1]])
    assert messages[1] == {"role": "assistant", "tool_calls": [{"name": "add"}]}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "expected a list of messages, found nothing"),
        ("hello", "expected a list of messages, found the text 'hello'"),
        ([], "expected a list of messages"),
        ([3], "message 1: expected an object with role and content, found the number 3"),
        ([ONE_TURN[0], {"role": "bot", "content": "x"}], "message 2 has the role 'bot', expected one of system"),
        ([{"content": "x"}], "message 1 has the role None"),
        ([{"role": "user", "content": " "}], r"message 1 \(user\) is empty"),
        ([ONE_TURN[0], {"role": "assistant", "content": None}], r"message 2 \(assistant\) is empty"),
        ([{"role": "user", "content": ["x"]}], r"message 1: expected a text as content, found the list \['x'\]"),
        ([ONE_TURN[0]], "no message is the assistant's"),
    ],
)
def test_what_is_no_conversation(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        conversation(value)


def test_in_words() -> None:
    assert in_words([{"role": "system", "content": "s"}, ONE_TURN[0]]) == USER
    assert in_words(TWO_TURNS[:3]) == f"user: {USER}\nassistant: {ANSWER}\nuser: Hello there"
