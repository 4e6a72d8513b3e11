"""C3A against the paper and peft."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.c3a import C3AConfig

# Blocks of even and odd size; none divides all sides.
SETTINGS = [{"block_size": 2}, {"block_size": 3, "init_weights": True}, {"block_size": 1}]
# One layer of the model only: peft gives a wrong gradient to what lies below an adapted layer, where nothing may train.
ONE: dict[str, Any] = {"layers_to_transform": [1]}
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"block_size": 8, "target_modules": ["q_proj", "v_proj"], **ONE}),
    (
        "bert",
        {
            "block_size": 4,
            "block_size_pattern": {"query": 16},
            "init_weights": True,
            "target_modules": ["query", "value"],
            **ONE,
        },
    ),
    ("perceptron", {"block_size": 2, "target_modules": ["lin1"]}),
]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def test_the_formula() -> None:
    layer = nn.Linear(6, 3, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = get_peft_model(nn.Sequential(layer), C3AConfig(block_size=3, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.kernel.copy_(torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]))
    expected = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 2, 6, 4, 5], [2, 3, 1, 5, 6, 4]]).double() / 6
    torch.testing.assert_close(model(torch.eye(6).double()).T, expected)
    torch.testing.assert_close(model.merge_and_unload()[0].weight.detach(), expected)


def test_what_lies_below_gets_the_gradient_of_the_adapted_weight() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 12).double()), C3AConfig(block_size=4, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    x, g = torch.randn(2, 8).double().requires_grad_(), torch.randn(2, 12).double()
    (gradient,) = torch.autograd.grad(model(x), x, g)
    torch.testing.assert_close(gradient, g @ adapter.adapt(adapter.site.read()))


def test_the_parameter_count_of_the_paper() -> None:
    # Chen et al., section 3.4: d1 d2 / b.
    config = C3AConfig(block_size=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(num_key_value_heads=4), config)
    assert model.get_nb_trainable_parameters()[0] == 4 * 32 * 32 // 8


@pytest.mark.parametrize(
    ("init_weights", "deviation"),
    [
        (True, 0.0),
        (False, math.sqrt(2 / 320)),
        ("xavier_uniform", math.sqrt(2 / 320)),
        ("kaiming_uniform", math.sqrt(1 / 256 / 3)),
        ("gaussian", 1.0),
    ],
)
def test_starting_values(init_weights: Any, deviation: float) -> None:
    config = C3AConfig(block_size=2, init_weights=init_weights, target_modules=["0"])
    ((_, adapter),) = adapters_of(get_peft_model(nn.Sequential(nn.Linear(256, 64)), config), "default")
    assert adapter.kernel.std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size=0; a positive whole number"),
        ({"block_size_pattern": {"q": -1}}, r"block_size_pattern\['q'\]=-1"),
        ({"init_weights": "xavier"}, "xavier_uniform"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        C3AConfig(**settings)
