"""Runs that pack their rows, and runs with batches of a number of tokens."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import veneer
from veneer.errors import ConfigError, UnsupportedError
from veneer.options import RunOptions
from veneer.training import arguments
from veneer.training.arguments import TrainingArguments
from veneer.training.run import train
from veneer.training.samplers import TokenBatches

from .test_trainer import QUIET, assert_same, rows, texts, trained, trainer

NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def reading(encoder: Path) -> Callable[..., veneer.PeftModel]:
    """Makes a classifier, the same each time."""

    def make(method: str = "lora:r=4,lora_dropout=0.1,task_type=SEQ_CLS", **config: Any) -> veneer.PeftModel:
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, **config)
        return veneer.get_peft_model(base, method)

    return make


@pytest.fixture
def writing(decoder: Path) -> Callable[[], veneer.PeftModel]:
    """Makes a language model, the same each time."""

    def make() -> veneer.PeftModel:
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(decoder)
        return veneer.get_peft_model(base, "lora:r=4,target_modules=all-linear,task_type=CAUSAL_LM")

    return make


RUN: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_ends_in_the_weights_of_the_padded_one(
    reading: Callable[..., veneer.PeftModel],
    tmp_path: Path,
    checkpointing: bool,
) -> None:
    settings = {**RUN, "activation_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    ends, scores = {}, {}
    for packing in ("off", "on"):
        model = reading("lora:r=4,task_type=SEQ_CLS", **NO_DROPOUT).double()
        run = trainer(model, tmp_path / packing, rows(17), eval_dataset=rows(9, 1), packing=packing, **settings)
        run.train()
        ends[packing] = trained(model)
        scores[packing] = run.evaluate()["eval_loss"]
        assert run.packing.line.startswith("Packed rows: nothing is computed for padding (") == (packing == "on")
    for name, tensor in ends["off"].items():
        torch.testing.assert_close(ends["on"][name], tensor, rtol=1e-6, atol=1e-8)
    assert scores["on"] == pytest.approx(scores["off"], rel=1e-6)
    assert any(not torch.equal(ends["on"][name], tensor) for name, tensor in ends["off"].items())  # it did pack


def test_a_run_packs_language_models(writing: Callable[..., veneer.PeftModel], tmp_path: Path) -> None:
    ends = {}
    for packing in ("off", "auto"):
        model = writing()
        trainer(model, tmp_path / packing, texts(17), packing=packing, max_grad_norm=0.0, **RUN).train()
        ends[packing] = trained(model)
    for name, tensor in ends["off"].items():
        torch.testing.assert_close(ends["auto"][name], tensor, rtol=1e-3, atol=1e-4)


def test_why_rows_are_not_packed_is_said_or_raised(
    reading: Callable[..., veneer.PeftModel],
    tmp_path: Path,
) -> None:
    method = "lily:r=4,task_type=SEQ_CLS"
    run = trainer(reading(method), tmp_path, rows(9))
    assert run.packing.line == "Packed rows: off, for adapter 'default' (Lily) mixes the rows of the batch."
    run = trainer(reading(method), tmp_path, rows(9), packing="on")
    with pytest.raises(UnsupportedError, match=r"training\.packing is 'on', but rows cannot be packed: adapter"):
        run.train()
    assert trainer(reading(), tmp_path, rows(9), packing="off").packing.line == ""


# ---- Batches by tokens ----


def test_batches_hold_every_example_once_within_the_budget() -> None:
    lengths = [len(row) for row in rows(40)["input_ids"]]
    for alike in (False, True):
        batches = TokenBatches(lengths, 30, seed=3, epochs=4, alike=alike)
        orders = []
        for epoch in range(4):
            batches.set_epoch(epoch)
            order = list(batches)
            assert len(order) == len(batches)
            assert sorted(i for batch in order for i in batch) == list(range(40))
            assert all(batch and sum(lengths[i] for i in batch) <= 30 for batch in order)
            orders.append(order)
        assert orders[0] != orders[1]
        batches.set_epoch(1)
        assert list(batches) == orders[1]
    with pytest.raises(ConfigError, match=r"tokens_per_batch is 8, but example \d+ alone has 13 tokens"):
        TokenBatches(lengths, 8, seed=3, epochs=1)


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_resuming_a_run_by_tokens_ends_in_the_same_weights(
    reading: Callable[..., veneer.PeftModel],
    tmp_path: Path,
    order: str,
) -> None:
    settings: dict[str, Any] = {
        "tokens_per_batch": 24, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_strategy": "steps",
        "save_steps": 1, "train_sampling_strategy": order,
    }  # fmt: skip
    model = reading()
    whole = trainer(model, tmp_path, rows(17), **settings)
    whole.train()
    steps = whole.state.global_step
    assert steps in (9, 12, 15)
    for step in (1, steps // 3, steps // 2 + 1):
        again = reading()
        resumed = trainer(again, tmp_path / "again", rows(17), **{**settings, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(trained(again), trained(model))


def test_a_step_by_tokens_is_the_mean_over_its_labels(
    writing: Callable[..., veneer.PeftModel],
    tmp_path: Path,
) -> None:
    """A whole epoch in one step: many small batches give the gradient of one that holds everything."""
    data = texts(12)
    ends = []
    for settings in ({"per_device_train_batch_size": 12}, {"tokens_per_batch": 20, "gradient_accumulation_steps": 99}):
        model = writing()
        settings |= {"num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0}
        run = trainer(model, tmp_path, data, lr_scheduler_type="constant", **settings)
        run.train()
        assert run.state.global_step == 1
        ends.append(trained(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "always"}, "training.packing is 'always'. Expected 'auto', 'on' or 'off'"),
        ({"tokens_per_batch": 0}, "training.tokens_per_batch is 0"),
        ({"tokens_per_batch": 9, "per_device_train_batch_size": 4}, "per_device_train_batch_size is 4, but"),
        ({"tokens_per_batch": 9, "dataloader_drop_last": True}, "dataloader_drop_last is True, but"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingArguments(output_dir=str(tmp_path), **QUIET, **settings)


def test_a_stream_has_no_lengths(reading: Callable[..., veneer.PeftModel], tmp_path: Path) -> None:
    stream = rows(9).to_iterable_dataset()
    run = trainer(reading(), tmp_path, stream, tokens_per_batch=30, max_steps=2)
    with pytest.raises(UnsupportedError, match="needs a training set of known length"):
        run.train()


def test_settings_of_a_run(classify: Callable[..., RunOptions]) -> None:
    for given, meant in ((True, "on"), (False, "off"), ("auto", "auto")):  # YAML reads `on` and `off` as truths
        options = classify(packing=given)
        assert arguments.check(options.training, options.output)["packing"] == meant
    options = classify(tokens_per_batch=64)
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size is 8, but training\.tokens_per_batch decides"):
        arguments.resolve(options, 1e-3, evaluates=True)
    del options.training["per_device_train_batch_size"]
    resolved = arguments.resolve(options, 1e-3, evaluates=True)
    assert arguments.build(resolved, options.output.folder).tokens_per_batch == 64


def test_a_run_says_what_it_does(classify: Callable[..., RunOptions]) -> None:
    written = io.StringIO()
    options = classify(num_train_epochs=1, packing="on")
    train(options, console=Console(file=written, width=200))
    assert "Packed rows: nothing is computed for padding (" in written.getvalue()
