"""Tiny random models with tokenizers of their own, and small data sets that can be learnt."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions

GOOD = ["bright", "warm", "lively", "tender", "funny"]
BAD = ["dull", "cold", "slow", "bitter", "boring"]
OTHER = ["the", "film", "was", "and", "a", "story", "with", "music", "plot", "end"]
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    words = SPECIAL + GOOD + BAD + OTHER
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]",
        model_max_length=64, padding_side="right",
    )  # fmt: skip


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head, dropout on."""
    folder = tmp_path_factory.mktemp("encoder")
    words = tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings."""
    folder = tmp_path_factory.mktemp("decoder")
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=64, bos_token_id=2, eos_token_id=3,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 labelled sentences; the first word, which the model's pooler looks at, tells the label."""
    draw = random.Random(0)
    lines = ["text,label"]
    for i in range(72):
        words = [draw.choice(GOOD if i % 2 else BAD), *draw.choices(OTHER, k=draw.randint(2, 9))]
        lines.append(f"{' '.join(words)},{'very_good' if i % 2 else 'bad'}")
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts, each with its own word as the answer, twice."""
    draw = random.Random(1)
    words = [draw.choice(GOOD + BAD) for _ in range(40)]
    lines = ["question,answer", *(f"the film was {word},{word} and {word}" for word in words)]
    file = tmp_path_factory.mktemp("data") / "answers.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def classify_into(encoder: Path, reviews: Path) -> Callable[..., RunOptions]:
    """Options of a small classification run; further keywords are fields of the training section."""

    def options(
        folder: Path,
        method: Any = "lora:r=4,lora_dropout=0.1",
        output: dict[str, Any] | None = None,
        **training: Any,
    ) -> RunOptions:
        return RunOptions(
            task="classification",
            model=ModelOptions(str(encoder), dtype="float32"),  # which type is fast differs from machine to machine
            data=DataOptions(str(reviews), validation_share=0.25),
            output=OutputOptions(**{"folder": str(folder), **(output or {})}),
            method=method,
            training={"learning_rate": 1e-2, "per_device_train_batch_size": 8, "num_train_epochs": 2, **training},
        )

    return options


@pytest.fixture
def classify(classify_into: Callable[..., RunOptions], tmp_path: Path) -> Callable[..., RunOptions]:
    """The same into the folder `run` of the test."""
    return functools.partial(classify_into, tmp_path / "run")


@pytest.fixture
def write(decoder: Path, answers: Path, tmp_path: Path) -> Callable[..., RunOptions]:
    """Options of a small language-modelling run; keywords are fields of the training section."""

    def options(
        method: Any = "lora:r=4,target_modules=all-linear", output: dict[str, Any] | None = None, **training: Any
    ) -> RunOptions:
        return RunOptions(
            task="causal-lm",
            model=ModelOptions(str(decoder), dtype="float32"),
            data=DataOptions(str(answers), validation_share=0.2),
            output=OutputOptions(**{"folder": str(tmp_path / "run"), **(output or {})}),
            method=method,
            training={"learning_rate": 1e-2, "num_train_epochs": 2, **training},
        )

    return options
