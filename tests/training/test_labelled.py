"""The loss at labelled positions is the model's own loss, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import tiny
import veneer
from parity import families
from veneer.errors import UnsupportedError
from veneer.training import labelled
from veneer.training.labelled import LabelledLoss


def _gemma2() -> nn.Module:
    sizes = {**tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8}
    return T.Gemma2ForCausalLM(T.Gemma2Config(**sizes, final_logit_softcapping=2.0, attn_implementation="eager"))


def _cohere() -> nn.Module:
    return T.CohereForCausalLM(T.CohereConfig(**tiny.SIZES, logit_scale=3.0))


def _granite() -> nn.Module:
    return T.GraniteForCausalLM(T.GraniteConfig(**tiny.SIZES, logits_scaling=4.0))


def _phi() -> nn.Module:  # its head has a bias
    return T.PhiForCausalLM(T.PhiConfig(**tiny.SIZES, resid_pdrop=0.0, embd_pdrop=0.0))


LIKE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}  # transformers' loss is one of float32

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny.llama,
    "gpt2": families.gpt2,
    "gemma2": _gemma2,
    "cohere": _cohere,
    "granite": _granite,
    "phi": _phi,
}


def batch() -> dict[str, Tensor]:
    inputs = {"input_ids": tiny.tokens(3), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    inputs["attention_mask"][1, 5:] = 0
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 2:4] = -100
    return {**inputs, "labels": labels}


def loss_and_gradients(model: nn.Module, **how: Any) -> list[Tensor]:
    loss = model(**batch(), **how).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *gradients]


def adapted(name: str, method: str = "lora:r=3,target_modules=all-linear") -> veneer.PeftModel:
    torch.manual_seed(0)
    model = veneer.get_peft_model(MODELS[name]().double(), method)
    tiny.randomise(model)
    return model.train()


@pytest.mark.parametrize("pieces", [3, 10**6])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model(name: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "_pieces", lambda vocabulary: pieces)
    model = adapted(name)
    usual = loss_and_gradients(model)
    context = LabelledLoss(model.get_base_model())
    with context():
        there = loss_and_gradients(model)
        assert model(**batch()).logits.shape[-1] == 32  # the head has not run
    assert len(usual) > 3
    for a, b in zip(there, usual, strict=True):
        torch.testing.assert_close(a, b, **LIKE)
    torch.testing.assert_close(loss_and_gradients(model), usual)
    assert model(**batch()).logits.shape[-1] == 50


@pytest.mark.parametrize("method", ["lora:r=2,target_modules=[lm_head]", "lora:r=2,modules_to_save=[lm_head]"])
def test_a_trained_head_has_its_gradients(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "_pieces", lambda vocabulary: 4)
    model = adapted("llama", method)
    usual = loss_and_gradients(model)
    with LabelledLoss(model.get_base_model())():
        there = loss_and_gradients(model)
    for a, b in zip(there, usual, strict=True):
        torch.testing.assert_close(a, b, **LIKE)


def test_a_number_of_labels_and_places_of_labels_may_be_given() -> None:
    model = adapted("llama")
    shifted = batch()["labels"].roll(-1, 1)
    for how in ({"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": shifted}):
        usual = loss_and_gradients(model, **how)
        with LabelledLoss(model.get_base_model())():
            there = loss_and_gradients(model, **how)
        torch.testing.assert_close(there, usual, **LIKE)


def test_models_with_another_loss_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="BertForSequenceClassification does not compute the usual loss"):
        LabelledLoss(tiny.bert())
    with pytest.raises(UnsupportedError, match="does not compute the usual loss"):
        LabelledLoss(nn.Linear(2, 2))


def test_what_a_model_does_to_its_logits_is_noticed() -> None:
    model = _cohere()  # scales its logits, which is no scale of the head's input where the head has a bias
    model.lm_head = nn.Linear(32, 50)
    with torch.no_grad():
        model.lm_head.bias.normal_()
    with pytest.raises(UnsupportedError, match="CohereForCausalLM changes its logits after the output head"):
        LabelledLoss(model)


def test_a_head_with_hooks_is_called() -> None:
    model = adapted("llama")
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, y: y.square())
    usual = loss_and_gradients(model)
    with LabelledLoss(model.get_base_model())():
        torch.testing.assert_close(loss_and_gradients(model), usual, **LIKE)
