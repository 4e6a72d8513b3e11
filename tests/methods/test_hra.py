"""HRA against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tiny import llama, randomise, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.hra import HRAConfig

SETTINGS = [{"r": 4}, {"r": 3, "apply_GS": True}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4}),
    ("llama", {"r": 3, "apply_GS": True}),
    ("bert", {"r": 2}),
    ("t5", {"r": 5}),
    ("perceptron", {"target_modules": ["lin0", "lin1"], "r": 2}),
    ("resnet", {"r": 4}),
]


def test_two_reflections_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 3.0]]))
    model = get_peft_model(nn.Sequential(layer), HRAConfig(r=2, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.normals.copy_(torch.tensor([[5.0, 1.0], [0.0, -1.0]]))
    # H_1 turns the first axis round, H_2 exchanges the two: (2, 3) H_1 H_2 = (-2, 3) H_2 = (3, -2).
    x = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.tensor([[3.0], [-2.0]], dtype=torch.float64))


@pytest.mark.parametrize("settings", [{"r": 6}, {"r": 6, "apply_GS": True}])
def test_the_change_is_orthogonal(settings: dict[str, Any]) -> None:
    layer = nn.Linear(8, 5).double()
    model = get_peft_model(nn.Sequential(layer), HRAConfig(target_modules=["0"], **settings))
    randomise(model)
    merged = model.merge_and_unload()[0].weight
    torch.testing.assert_close(merged @ merged.t(), layer.weight @ layer.weight.t())


def test_as_many_parameters_as_the_paper_states() -> None:
    # r d for a layer with d inputs.
    model = get_peft_model(llama(), HRAConfig(r=4, target_modules=["down_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * 48


def test_where_the_start_is_the_base_model() -> None:
    x = tokens()
    expected = llama()(x).logits
    for settings, same in (
        ({}, True),
        ({"r": 3}, False),
        ({"apply_GS": True}, False),
        ({"init_weights": False}, False),
    ):
        torch.manual_seed(0)
        model = get_peft_model(llama(), HRAConfig(**settings))
        assert torch.allclose(model(x).logits, expected, atol=1e-5) == same
        assert all(adapter.starts_as_base == same for _, adapter in adapters_of(model, "default"))
        assert model(x).logits.isfinite().all()


def test_more_orthogonal_vectors_than_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"r=33 with apply_GS: a layer of width 32"):
        get_peft_model(llama(), HRAConfig(r=33, apply_GS=True))
