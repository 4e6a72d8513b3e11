"""The first example as the user sees it before step 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from veneer.data import preview, preview_text
from veneer.data.batches import IGNORED
from veneer.data.chat import chat_draft
from veneer.data.masking import encode_drafts

Make = Callable[..., PreTrainedTokenizerFast]

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am fine. 😀"}]
EXPECTED = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦I am fine. 😀<|im_end|>⟧\n"


def example(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    row = encode_drafts([chat_draft(MESSAGES, tokenizer)], tokenizer, False)[0]
    return {"input_ids": row.input_ids, "labels": row.labels}


def test_trained_tokens_are_marked(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    text = preview(example(tokenizer), tokenizer)
    assert text.plain == EXPECTED == preview_text(example(tokenizer), tokenizer)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["⟦I am fine. 😀<|im_end|>⟧"] == "bold green"
    assert styles["\n"] == "dim"


def test_words_keep_their_spaces(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("llama2", "sentence-piece")
    assert preview_text(example(tokenizer), tokenizer).endswith("[INST] Hello [/INST]⟦ I am fine. 😀 </s>⟧")


@pytest.mark.parametrize(("labels", "name"), [(None, "1"), (["neg", "very_good"], "very good")])
def test_a_class(encoder_tokenizer: PreTrainedTokenizerFast, labels: list[str] | None, name: str) -> None:
    row = {"input_ids": encoder_tokenizer("The film")["input_ids"], "labels": 1}
    assert preview_text(row, encoder_tokenizer, labels) == f"[CLS] the film [SEP] ⟦{name}⟧"
    assert preview(row, encoder_tokenizer, labels).plain.endswith(f"⟦{name}⟧")


def test_data_do_not_steer_the_terminal(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("a\x1b[2Jb\r\tc\x9b")["input_ids"]
    row = {"input_ids": ids, "labels": [IGNORED] * len(ids)}
    assert preview_text(row, tokenizer) == "a\\x1b[2Jb\\r\tc\\x9b"
    assert preview(row, tokenizer).plain == "a\\x1b[2Jb\\r\tc\\x9b"
