"""MiSS and its variants against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from contract.places import Spot
from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError

SETTINGS: list[dict[str, Any]] = [
    {"r": 2},
    {"r": 4},  # divides not all
    {"r": 2, "init_weights": "bat"},
    {"r": 4, "mini_r": 2, "init_weights": "mini"},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4}),
    ("llama", {"r": 5}),
    ("bert", {"r": 4, "mini_r": 8, "init_weights": "mini"}),
    ("llama", {"r": 8, "init_weights": "bat"}),
    ("t5", {"r": 7, "mini_r": 4, "init_weights": "mini"}),
    ("perceptron", {"r": 4, "target_modules": ["lin0", "lin1"]}),
]


def fits(settings: dict[str, Any], spot: Spot) -> bool:
    return settings.get("init_weights") != "bat" or spot.name != "Conv2d, depthwise"  # 9 inputs


def changed(layer: nn.Linear, settings: str) -> torch.Tensor:
    """The adapted weight less the layer's, the block counting up from 1."""
    model = get_peft_model(nn.Sequential(layer.double()), f"miss:target_modules=['0'],{settings}")
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.block.copy_(torch.arange(1.0, adapter.block.numel() + 1).view(adapter.block.shape))
    x = torch.eye(layer.in_features, dtype=torch.float64)
    return (model(x) - layer(x)).t()


def test_plain_by_hand() -> None:
    change = changed(nn.Linear(5, 3), "r=2")  # block = [[1, 2, 3], [4, 5, 6]]
    expected = torch.tensor([[1.0, 4, 1, 4, 1], [2, 5, 2, 5, 2], [3, 6, 3, 6, 3]], dtype=torch.float64)
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)


def test_mini_by_hand() -> None:
    change = changed(nn.Linear(3, 4), "r=3,mini_r=2,init_weights=mini")  # block = [[1, 2], [3, 4], [5, 6]]
    expected = torch.tensor([[1.0, 3, 5], [2, 4, 6]] * 2, dtype=torch.float64)
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)


def test_bat_by_hand() -> None:
    layer = nn.Linear(4, 2, bias=False)
    change = changed(layer, "r=2,init_weights=bat")
    block = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    weight = layer.weight.detach()
    expected = torch.cat([weight[:, :2] @ block + block, weight[:, 2:] @ block + block], dim=1)
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "each"), [("r=4", 4 * 32), ("r=4,mini_r=8,init_weights=mini", 32), ("r=4,init_weights=bat", 4 * 32)]
)
def test_the_number_of_parameters(settings: str, each: int) -> None:
    model = get_peft_model(llama(), f"miss:target_modules=[q_proj],{settings}")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * each


@pytest.mark.parametrize("settings", ["r=2", "r=3", "r=2,init_weights=mini", "r=2,init_weights=bat"])
def test_dropout_drops_from_the_change_alone(settings: str) -> None:
    layer, x = nn.Linear(6, 6), torch.randn(2, 6)
    model = get_peft_model(nn.Sequential(layer), f"miss:target_modules=['0'],miss_dropout=0.5,{settings}")
    torch.testing.assert_close(model.train()(x), layer(x))
    ((_, adapter),) = adapters_of(model, "default")
    nn.init.ones_(adapter.block)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("r=7", "r=7 is more than the inputs of a layer whose weight is 4 x 6"),
        ("r=3,init_weights=bat", "r=3 does not divide both sides of a layer whose weight is 4 x 6"),
        ("r=2,mini_r=3,init_weights=mini", "mini_r=3 does not divide the outputs of a layer whose weight is 4 x 6"),
        ("r=2,init_weights=bone", "init_weights='bone'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(nn.Sequential(nn.Linear(6, 4)), f"miss:target_modules=['0'],{settings}")
