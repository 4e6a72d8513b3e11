"""RoAd against the paper and peft."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from contract.places import Spot
from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.road import RoadConfig

VARIANTS = ("road_1", "road_2", "road_4")
SETTINGS = [{"variant": variant, "group_size": 2} for variant in VARIANTS]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"variant": "road_1", "group_size": 16}),
    ("bert", {"variant": "road_2", "group_size": 8}),
    ("t5", {"variant": "road_4", "group_size": 4}),
    ("perceptron", {"target_modules": ["lin0", "lin1"], "variant": "road_4", "group_size": 2}),
]


def fits(settings: dict[str, Any], spot: Spot) -> bool:
    return spot.name != "Conv2d, depthwise"  # pairs would lie in different groups


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pair_by_hand(variant: str) -> None:
    layer = nn.Linear(1, 4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.0], [2.0], [0.0]]))
        layer.bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))
    model = get_peft_model(nn.Sequential(layer), RoadConfig(variant=variant, group_size=4, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    angle, scale = {
        "road_1": ([0.3, 0.0], [2.0, 1.0]),
        "road_2": ([0.3, 0.0, 0.5, 0.0], [2.0, 1.0, 3.0, 1.0]),
        "road_4": ([0.3, 0.0, 0.5, 0.0, 0.7, 0.0, 0.9, 0.0], [2.0, 1.0, 3.0, 1.0, 4.0, 1.0, 5.0, 1.0]),
    }[variant]
    with torch.no_grad():
        adapter.angle.copy_(torch.tensor(angle))
        adapter.scale.copy_(torch.tensor(scale))
    # Channels 0 and 2 are a pair, with values 1 and 2; 1 and 3 are another, and stay as they are.
    c, s = math.cos, math.sin
    pair = {
        "road_1": (2 * c(0.3) - 2 * s(0.3) * 2, 2 * s(0.3) + 2 * c(0.3) * 2),
        "road_2": (2 * c(0.3) - 2 * s(0.3) * 2, 3 * s(0.5) + 3 * c(0.5) * 2),
        "road_4": (2 * c(0.3) - 4 * s(0.7) * 2, 5 * s(0.9) + 3 * c(0.5) * 2),
    }[variant]
    y = model(torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor([[pair[0], 5.0, pair[1], 5.0]], dtype=torch.float64))


@pytest.mark.parametrize(("variant", "factor"), [("road_1", 1), ("road_2", 2), ("road_4", 4)])
def test_as_many_parameters_as_the_paper_states(variant: str, factor: int) -> None:
    # d, 2 d and 4 d for a layer with d outputs.
    config = RoadConfig(variant=variant, group_size=16, target_modules=["down_proj"])
    assert get_peft_model(llama(), config).get_nb_trainable_parameters()[0] == 2 * factor * 32


def test_group_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"q_proj: group_size=64 does not divide the 32 output channels"):
        get_peft_model(llama(), RoadConfig())
    with pytest.raises(ConfigError, match=r"group_size=3; a positive even number"):
        RoadConfig(group_size=3)
