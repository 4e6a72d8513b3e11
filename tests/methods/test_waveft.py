"""WaveFT against the paper and peft."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet
from torch import nn

from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.fourierft import places
from veneer.methods.waveft import WaveFTConfig, low_pass

SETTINGS = [
    {"n_frequency": 6, "scaling": 20.0},
    {"n_frequency": 5, "wavelet_family": "db3", "random_loc_seed": 3},
    {"n_frequency": 4, "use_idwt": False, "init_weights": False, "proportional_parameters": True},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"n_frequency": 100}),
    ("gpt2", {"n_frequency": 200, "scaling": 10.0, "wavelet_family": "sym4", "random_loc_seed": 5}),
    ("bert", {"n_frequency": 50, "proportional_parameters": True, "wavelet_family": "db6"}),
    ("t5", {"n_frequency": 30, "n_frequency_pattern": {"q": 60}, "wavelet_family": "coif2"}),
    ("llama", {"n_frequency": 40, "use_idwt": False}),
    ("perceptron", {"n_frequency": 20, "init_weights": False, "target_modules": ["lin0"]}),
]
NAMES = [
    *(f"db{n}" for n in (*range(1, 11), 20, 38)),
    *(f"sym{n}" for n in range(2, 11)),
    *(f"coif{n}" for n in range(1, 4)),
]


@pytest.mark.parametrize("name", NAMES)
def test_filters_are_orthonormal_and_those_of_peft(name: str) -> None:
    low = torch.tensor(low_pass(name), dtype=torch.float64)
    assert low.sum().item() == pytest.approx(math.sqrt(2), abs=1e-9)
    for shift in range(0, len(low), 2):
        product = (low[shift:] * low[: len(low) - shift]).sum().item()
        assert product == pytest.approx(float(shift == 0), abs=1e-9)
    moments = {"db": 1, "sym": 1, "coi": 2}[name[:3].rstrip("0123456789")] * int(name.lstrip("dbsymcoif"))
    high = low.flip(0) * (-1.0) ** torch.arange(len(low))
    for power in range(min(moments, 4)):
        assert (high * torch.arange(len(low)).double() ** power).sum().item() == pytest.approx(0, abs=1e-4)
    if name[:2] != "db" or int(name[2:]) <= 10:  # peft has tables of these
        torch.testing.assert_close(low, torch.tensor(Wavelet(name).rec_lo, dtype=torch.float64), rtol=0, atol=1e-11)


def test_haar_coefficients_are_blocks_of_two_by_two() -> None:
    layer = nn.Linear(4, 2, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = get_peft_model(nn.Sequential(layer), WaveFTConfig(n_frequency=8, scaling=2.0, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    # The quarters are average, horizontal, vertical and diagonal differences; each has one row and two columns.
    signs = {
        (0, 0): [[1, 1], [1, 1]],
        (0, 1): [[1, 1], [-1, -1]],
        (1, 0): [[1, -1], [1, -1]],
        (1, 1): [[1, -1], [-1, 1]],
    }
    for i, place in enumerate(places(8, 8, 777).tolist()):
        with torch.no_grad():
            adapter.spectrum.zero_()
            adapter.spectrum[i] = 3.0
        row, column = divmod(place, 4)
        expected = torch.zeros(2, 4).double()
        left = 2 * (column % 2)
        expected[:, left : left + 2] = 2 * 3 * torch.tensor(signs[row, column // 2]).double() / 2
        torch.testing.assert_close(model(torch.eye(4).double()).T, expected)


def test_the_budget_may_follow_the_size_of_the_layers() -> None:
    modules = ["q_proj", "k_proj", "down_proj"]
    config = WaveFTConfig(n_frequency=100, proportional_parameters=True, target_modules=modules)
    model = get_peft_model(llama(), config)
    counts = {w.path.rpartition(".")[2]: a.spectrum.numel() for w, a in adapters_of(model, "default")}
    total = 32 * 32 + 32 * 16 + 32 * 48
    assert counts == {
        "q_proj": round(300 * 32 * 32 / total),
        "k_proj": round(300 * 32 * 16 / total),
        "down_proj": round(300 * 32 * 48 / total),
    }


def test_the_parameter_count_of_the_paper() -> None:
    # Bilican et al., section 3: p coefficients a layer.
    model = get_peft_model(llama(), WaveFTConfig(n_frequency=200, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 200 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_frequency": 0}, "n_frequency=0; a positive whole number"),
        ({"wavelet_family": "db39"}, "wavelet_family='db39'; one of db1 to db38"),
        ({"wavelet_family": "coif4"}, "wavelet_family='coif4'"),
        ({"wavelet_family": "haar2"}, "wavelet_family='haar2'"),
        ({"proportional_parameters": True, "n_frequency_pattern": {"q": 1}}, "n_frequency_pattern has no effect"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WaveFTConfig(**settings)


def test_more_coefficients_than_elements_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0: n_frequency=2592 on a weight of 2 x 3; 6 at most"):
        get_peft_model(nn.Sequential(nn.Linear(3, 2)), WaveFTConfig(target_modules=["0"]))
