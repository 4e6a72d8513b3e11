"""FourierFT against the paper and peft."""

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
from veneer.methods.fourierft import FourierFTConfig, places

SETTINGS = [{"n_frequency": 6, "scaling": 20.0}, {"n_frequency": 5, "random_loc_seed": 3, "init_weights": True}]
# Not on layers before a LayerNorm: the gradient of a coefficient in row 0 is zero there, but for rounding.
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"n_frequency": 100}),
    ("gpt2", {"n_frequency": 40, "scaling": 20.0, "random_loc_seed": 5, "target_modules": ["c_attn"]}),
    ("bert", {"n_frequency": 30, "n_frequency_pattern": {"query": 60}}),
    ("perceptron", {"n_frequency": 20, "init_weights": True, "target_modules": ["lin0"]}),
]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (4, 5), (5, 3), (6, 6), (1, 7), (7, 1), (2, 2)])
def test_every_coefficient_is_a_cosine(rows: int, columns: int) -> None:
    layer = nn.Linear(columns, rows, bias=False).double()
    nn.init.zeros_(layer.weight)
    config = FourierFTConfig(n_frequency=rows * columns, scaling=10.0, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    j, k = torch.arange(rows).double()[:, None], torch.arange(columns).double()
    for i, place in enumerate(places(rows * columns, rows * columns, 777).tolist()):
        with torch.no_grad():
            adapter.spectrum.zero_()
            adapter.spectrum[i] = 2.0
        p, q = divmod(place, columns)
        expected = 10 * 2 * torch.cos(2 * math.pi * (p * j / rows + q * k / columns)) / (rows * columns)
        torch.testing.assert_close(model(torch.eye(columns).double()).T, expected)


def test_the_parameter_count_of_the_paper() -> None:
    # Gao et al., section 3.2: n L.
    model = get_peft_model(llama(), FourierFTConfig(n_frequency=200, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 200 * 4


def test_it_starts_normal_or_from_zero() -> None:
    for init_weights, deviation in ((False, 1.0), (True, 0.0)):
        config = FourierFTConfig(n_frequency=1000, init_weights=init_weights, target_modules=["q_proj"])
        _, adapter = next(adapters_of(get_peft_model(llama(), config), "default"))
        assert adapter.spectrum.std().item() == pytest.approx(deviation, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_frequency": 0}, "n_frequency=0; a positive whole number"),
        ({"n_frequency_pattern": {"q": -1}}, r"n_frequency_pattern\['q'\]=-1"),
        ({"random_loc_seed": None}, "random_loc_seed=None; a number"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FourierFTConfig(**settings)


def test_more_coefficients_than_elements_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"n_frequency=1000 on a weight of 2 x 3: 6 at most"):
        get_peft_model(nn.Sequential(nn.Linear(3, 2)), FourierFTConfig(target_modules=["0"]))
