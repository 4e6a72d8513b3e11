"""Base model and adapter in one call, from folders alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import veneer
from tiny import SIZES, bert, llama, randomise, tokens
from veneer import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    get_peft_model,
)
from veneer.config import CONFIG_NAME
from veneer.errors import BaseMismatchError, CheckpointError, ConfigError

T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}

# Task, the class of the base model, the class that loads it, the class of the adapted model.
TASKS: dict[str, tuple[Any, Any, Any]] = {
    "CAUSAL_LM": (lambda: llama(), AutoPeftModelForCausalLM, veneer.PeftModelForCausalLM),
    "SEQ_CLS": (
        lambda: bert(num_labels=2),
        AutoPeftModelForSequenceClassification,
        veneer.PeftModelForSequenceClassification,
    ),
    "TOKEN_CLS": (
        lambda: T.BertForTokenClassification(T.BertConfig(**SIZES)),
        AutoPeftModelForTokenClassification,
        veneer.PeftModelForTokenClassification,
    ),
    "QUESTION_ANS": (
        lambda: T.BertForQuestionAnswering(T.BertConfig(**SIZES)),
        AutoPeftModelForQuestionAnswering,
        veneer.PeftModelForQuestionAnswering,
    ),
    "FEATURE_EXTRACTION": (
        lambda: T.BertModel(T.BertConfig(**SIZES)),
        AutoPeftModelForFeatureExtraction,
        veneer.PeftModelForFeatureExtraction,
    ),
    "SEQ_2_SEQ_LM": (
        lambda: T.T5ForConditionalGeneration(T.T5Config(decoder_start_token_id=0, **T5)),
        AutoPeftModelForSeq2SeqLM,
        veneer.PeftModelForSeq2SeqLM,
    ),
}


def outputs(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": tokens(3, 2)} if "T5" in type(model.get_base_model()).__name__ else {}
    with torch.no_grad():
        found = model.eval()(tokens(), **more)
    return found[0]


def save(task: str | None, make: Any, folder: Path, method: str = "lora:r=2", **settings: Any) -> Tensor:
    """Writes a base model and an adapter on it; returns what they compute."""
    torch.manual_seed(0)
    make().save_pretrained(folder / "base")
    base = type(make()).from_pretrained(folder / "base")
    config = veneer.parse_method(method)
    config.task_type = task
    model = get_peft_model(base, config)
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return outputs(model)


@pytest.mark.parametrize("task", TASKS)
def test_round_trip(task: str, tmp_path: Path) -> None:
    make, auto, expected_class = TASKS[task]
    expected = save(task, make, tmp_path)
    for loader in (auto, AutoPeftModel):
        loaded = loader.from_pretrained(tmp_path / "adapter")
        assert type(loaded) is expected_class
        assert type(loaded.get_base_model()) is type(make())
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(outputs(loaded), expected)


@pytest.mark.parametrize("method", ["bitfit", "houlsby:reduction=4", "lora:r=2,modules_to_save=[classifier]"])
def test_other_methods(method: str, tmp_path: Path) -> None:
    expected = save("SEQ_CLS", lambda: bert(num_labels=2), tmp_path, method)
    assert torch.equal(outputs(AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")), expected)


def test_arguments_reach_adapter_and_base(tmp_path: Path) -> None:
    save("CAUSAL_LM", llama, tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", "mine", is_trainable=True, dtype=torch.bfloat16
    )
    assert list(loaded.peft_config) == ["mine"]
    trained = {name: parameter for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".adapters.mine." in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert loaded.get_base_model().dtype == torch.bfloat16
    given = LoraConfig(r=2, lora_alpha=0, base_model_name_or_path=str(tmp_path / "base"))
    silent = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", config=given)
    assert torch.equal(outputs(silent), silent.get_base_model()(tokens()).logits)
    assert silent.active_peft_config.lora_alpha == 0
    with pytest.raises(TypeError, match="no_such_setting"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", no_such_setting=3)


def test_a_head_with_other_labels(tmp_path: Path) -> None:
    T.BertModel(T.BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    base = T.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", num_labels=5)
    assert torch.equal(outputs(loaded), outputs(model))
    with pytest.raises(CheckpointError, match=r"classifier\.weight has shape \(5, 32\), expected \(2, 32\)"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("missing", ["task_type", "base_model_name_or_path"])
def test_adapters_that_do_not_say_enough(missing: str, tmp_path: Path) -> None:
    save("CAUSAL_LM", llama, tmp_path)
    path = tmp_path / "adapter" / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), missing: None}))
    with pytest.raises(ConfigError, match=rf"does not say its {missing}\. Load the base model yourself"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    if missing == "task_type":  # the class says it
        assert type(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")) is veneer.PeftModel


def test_an_adapter_for_another_task(tmp_path: Path) -> None:
    save("CAUSAL_LM", llama, tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"is for task_type='CAUSAL_LM'; AutoPeftModelForSequenceClassification loads 'SEQ_CLS'\. Use AutoPeft",
    ):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_folders_that_are_not_there_or_have_changed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder here"):
        AutoPeftModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"has no {CONFIG_NAME}"):
        AutoPeftModel.from_pretrained(tmp_path)
    save("CAUSAL_LM", llama, tmp_path)
    llama(seed=5).save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatchError, match=r"was trained on another base model.*base_model_name_or_path"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
