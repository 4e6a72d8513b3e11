"""DEFT and PaRa against the paper and peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny import llama, randomise
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.methods.deft import DeftConfig

SETTINGS: list[dict[str, Any]] = [
    {"r": 3, "alpha": 7},
    {"r": 2, "decomposition_method": "qr"},
    {"r": 2, "para": True},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "alpha": 7}),
    ("gpt2", {"r": 3, "fan_in_fan_out": True}),
    ("bert", {"r": 3, "alpha": 7, "decomposition_method": "qr"}),
    ("t5", {"r": 3, "para": True}),
    ("perceptron", {"target_modules": ["lin0", "lin1"], "r": 16}),
]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # peft computes this method in single precision


def linear(**settings: Any) -> tuple[nn.Linear, Any, Any]:
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    model = get_peft_model(nn.Sequential(layer), DeftConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    return layer, model, adapter


def test_one_direction_by_hand() -> None:
    _, model, adapter = linear(r=1, alpha=3)
    with torch.no_grad():
        adapter.directions.copy_(torch.tensor([[2.0], [-1.0]]))
        adapter.content.copy_(torch.tensor([[5.0, 7.0]]))
    # relu(P) = (2, 0), so K^T W = (2, 4); W' = W + P (3 (5, 7) - (2, 4)) = W + P (13, 17).
    x = torch.eye(2, dtype=torch.float64)
    expected = torch.tensor([[1.0 + 26 + 10, 3.0 - 13 + 20], [2.0 + 34 + 10, 4.0 - 17 + 20]], dtype=torch.float64)
    torch.testing.assert_close(model(x), expected)


def test_an_orthogonal_projection_by_hand() -> None:
    _, model, adapter = linear(r=1, decomposition_method="qr", para=True)
    with torch.no_grad():
        adapter.directions.copy_(torch.tensor([[3.0], [0.0]]))
    # The first output is taken out; the bias stays.
    expected = torch.tensor([[10.0, 23.0], [10.0, 24.0]], dtype=torch.float64)
    torch.testing.assert_close(model(torch.eye(2, dtype=torch.float64)), expected)


def test_a_projection_lowers_the_rank() -> None:
    layer = nn.Linear(6, 5).double()
    config = DeftConfig(r=2, decomposition_method="qr", para=True, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    randomise(model)
    assert torch.linalg.matrix_rank(model.merge_and_unload()[0].weight) == 3


def test_as_many_parameters_as_the_paper_states() -> None:
    # r (d + k), as many as LoRA of the same rank; half of them without the content.
    for para, expected in ((False, 3 * (48 + 32)), (True, 3 * 32)):
        model = get_peft_model(llama(), DeftConfig(r=3, para=para, target_modules=["down_proj"]))
        assert model.get_nb_trainable_parameters()[0] == 2 * expected


def test_where_the_start_is_the_base_layer() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    for settings, same in (({}, True), ({"para": True}, False), ({"init_weights": False}, False)):
        torch.manual_seed(0)
        layer, model, adapter = linear(r=1, **settings)
        assert adapter.starts_as_base == same
        assert torch.allclose(model(x), layer(x), rtol=1e-12) == same


def test_dropout_acts_on_the_content_only() -> None:
    _, model, adapter = linear(r=1, deft_dropout=0.5)
    x = torch.ones(2000, 2, dtype=torch.float64)
    model.train()
    with torch.no_grad():
        adapter.directions.copy_(torch.tensor([[1.0], [0.0]]))
        y = model(x)
        torch.testing.assert_close(y[:, 1], torch.full((2000,), 27.0, dtype=torch.float64))
        assert y[:, 0].unique().numel() == 4
        torch.testing.assert_close(y[:, 0].mean(), model.eval()(x)[0, 0], rtol=0.2, atol=0)
