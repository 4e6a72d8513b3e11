"""Prompt tuning: what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
import veneer
from parity.families import bart
from veneer.errors import ConfigError

SETTINGS: list[dict[str, Any]] = []  # needs a model that reads text: see tests/prompting/test_prompts.py


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A folder with a tokenizer of three words."""
    plain = Tokenizer(models.WordLevel({"good": 7, "bad": 8, "film": 9, "?": 3}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def start(model: torch.nn.Module, **settings: Any) -> torch.Tensor:
    adapted = veneer.get_peft_model(model, veneer.PromptTuningConfig(**settings))
    return veneer.get_peft_model_state_dict(adapted)["prompt_embeddings"]


@pytest.mark.parametrize(("n", "ids"), [(2, [7, 8]), (5, [7, 8, 9, 7, 8]), (None, [7, 8, 9])])
def test_a_text_is_cut_or_repeated_or_taken_whole(words: str, n: int | None, ids: list[int]) -> None:
    model = tiny.llama()
    text = {"prompt_tuning_init": veneer.PromptTuningInit.TEXT, "prompt_tuning_init_text": "good bad film"}
    prompt = start(model, num_virtual_tokens=n, tokenizer_name_or_path=words, **text)
    table = model.get_input_embeddings().base_layer.weight
    assert torch.equal(prompt, table[ids])


def test_a_demonstration_starts_as_the_model_that_has_read_it(words: str) -> None:
    base, ids = tiny.llama().double(), tiny.tokens()
    expected = base(torch.cat([torch.tensor([[9, 7, 9, 8]]).expand(3, 4), ids], 1)).logits
    base.config.name_or_path = words  # the base model's tokenizer
    model = veneer.get_peft_model(
        base, veneer.PromptTuningConfig(prompt_tuning_init="text", prompt_tuning_init_text="film good film bad")
    )
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-12, atol=1e-12)
    config = model.peft_config["default"]
    assert (config.num_virtual_tokens, config.tokenizer_name_or_path) == (4, words)


def test_tokens_of_the_vocabulary_are_scaled_as_the_model_scales_them() -> None:
    model = bart()
    table = model.get_input_embeddings().weight.detach().clone() * 32**0.5
    prompt = start(model, num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    assert all(any(torch.allclose(vector, row) for row in table) for vector in prompt)
    assert len({tuple(vector.tolist()) for vector in prompt}) > 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompt_tuning_init": "TXT"}, "TEXT"),
        ({"prompt_tuning_init": "TEXT"}, "needs prompt_tuning_init_text"),
        ({"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs are used with"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        veneer.PromptTuningConfig(**{"num_virtual_tokens": 2, **settings})


def test_a_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer_name_or_path"):
        start(tiny.llama(), prompt_tuning_init="TEXT", prompt_tuning_init_text="good")
