"""Full fine-tuning as a method against ordinary fine-tuning of the model itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import tiny
import veneer
from tiny import bert, llama, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import UnsupportedError
from veneer.methods.full import FullConfig


def vit() -> T.ViTForImageClassification:
    sizes = {k: v for k, v in tiny.SIZES.items() if k != "vocab_size"}
    torch.manual_seed(0)
    return T.ViTForImageClassification(T.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4)).eval()


MODELS: list[tuple[Any, dict[str, Any]]] = [
    (llama, {"input_ids": tokens(), "labels": tokens()}),
    (lambda: llama(tie_word_embeddings=True), {"input_ids": tokens(), "labels": tokens()}),
    (bert, {"input_ids": tokens(), "labels": torch.tensor([0, 2, 1])}),
    (vit, {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 3, 1])}),
]


def train(model: nn.Module, batch: dict[str, Any]) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


@pytest.mark.parametrize(("make", "batch"), MODELS)
def test_it_is_ordinary_fine_tuning(make: Any, batch: dict[str, Any], tmp_path: Any) -> None:
    plain = make()
    base = copy.deepcopy(plain.state_dict())
    model = get_peft_model(make(), FullConfig())
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in plain.parameters())
    assert train(model, batch) == pytest.approx(train(plain, batch), rel=1e-5)
    expected = plain(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, make()(**batch).logits)
    merged = model.merge_and_unload()
    assert torch.equal(merged(**batch).logits, loaded(**batch).logits)
    assert merged.state_dict().keys() == base.keys()


def test_a_task_head_is_trained_once() -> None:
    plain = bert()
    model = get_peft_model(bert(), FullConfig(task_type="SEQ_CLS"))
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in plain.parameters())


def test_only_the_targets_where_they_are_named() -> None:
    model = get_peft_model(llama(), FullConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    assert [wrapper.path for wrapper, _ in adapters_of(model, "default")] == ["model.layers.1.self_attn.q_proj"]
    assert model.get_nb_trainable_parameters()[0] == 32 * 32


def test_files_hold_the_weights_under_their_own_names(tmp_path: Any) -> None:
    model = get_peft_model(llama(tie_word_embeddings=True), FullConfig())
    state = veneer.get_peft_model_state_dict(model)
    assert {key.removeprefix("base_model.model.") for key in state} == {
        key for key in llama().state_dict() if key != "lm_head.weight"
    }


def test_a_model_with_parameters_of_its_own_says_so() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.layer = nn.Linear(2, 2)

    with pytest.raises(UnsupportedError, match="Scaled holds scale itself"):
        get_peft_model(Scaled(), FullConfig())
