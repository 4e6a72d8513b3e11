"""BEFT against the paper and peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny import bert, llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.methods.beft import BeftConfig

PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("bert", {"target_modules": None}),
    ("t5", {"target_modules": None}),
    ("perceptron", {"target_modules": ["lin0", "lin1"]}),
]


def test_the_delta_is_added_to_the_bias() -> None:
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.copy_(torch.tensor([1.0, 2.0]))
    model = get_peft_model(nn.Sequential(layer), BeftConfig(target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.delta.copy_(torch.tensor([10.0, 20.0]))
    x = torch.tensor([[5.0, 6.0]], dtype=torch.float64)
    assert torch.equal(model(x), torch.tensor([[16.0, 28.0]], dtype=torch.float64))


def test_value_projections_are_trained() -> None:
    model = get_peft_model(bert(), BeftConfig())
    assert model.get_nb_trainable_parameters()[0] == 2 * 32
    assert {wrapper.path.rpartition(".")[2] for wrapper, _ in adapters_of(model, "default")} == {"value"}


def test_a_model_without_biases_is_merged_too() -> None:
    # peft raises here: its layers have no place for the bias.
    torch.manual_seed(0)
    model = get_peft_model(llama(), BeftConfig(init_weights=False))
    x = torch.arange(6).view(1, 6)
    expected = model(x).logits
    torch.testing.assert_close(model.merge_and_unload()(x).logits, expected, rtol=1e-5, atol=1e-5)
