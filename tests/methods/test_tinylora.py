"""TinyLoRA against the paper and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer
from tiny import llama, randomise, tokens
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.tinylora import TinyLoraConfig

SETTINGS = [
    {"r": 3, "u": 5},
    {"r": 2, "u": 4, "weight_tying": 1.0, "save_projection": False, "init_weights": "uniform"},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "u": 7}),
    ("gpt2", {"r": 2, "u": 5, "weight_tying": 0.5, "save_projection": False, "projection_seed": 3}),
    ("bert", {"r": 4, "u": 3, "weight_tying": 1.0, "init_weights": "uniform"}),
    ("perceptron", {"r": 7, "u": 4}),
]


def test_the_formula() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 4.0, 0.0], [9.0, 0.0, 0.0]]))
    model = veneer.get_peft_model(nn.Sequential(layer), TinyLoraConfig(r=2, u=2, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    # Singular values 9 and 4: up down is the weight, whatever the signs of the singular vectors.
    torch.testing.assert_close(adapter.up @ adapter.down, layer.weight.detach())
    torch.testing.assert_close(adapter.up.abs(), torch.tensor([[0.0, 2.0], [3.0, 0.0]]).double())
    with torch.no_grad():
        adapter.bases.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]]))
        adapter.shared.tinylora_v["0"].copy_(torch.tensor([1.0, 3.0]))
    # R = diag(7, 1)
    expected = torch.tensor([[0.0, 4 + 4, 0.0], [9 + 7 * 9, 0.0, 0.0]]).double()
    torch.testing.assert_close(model(torch.eye(3).double()).T, expected)


@pytest.mark.parametrize(
    ("weight_tying", "groups"),
    [(0.0, "012345"), (0.5, "001122"), (0.7, "000111"), (0.35, "012333"), (1.0, "000000")],
)
def test_layers_share_vectors(weight_tying: float, groups: str) -> None:
    config = TinyLoraConfig(u=5, weight_tying=weight_tying, target_modules=["q_proj", "v_proj", "down_proj"])
    model = veneer.get_peft_model(llama(), config)
    assert "".join(adapter.group for _, adapter in adapters_of(model, "default")) == groups
    assert model.get_nb_trainable_parameters()[0] == 5 * len(set(groups))


def test_thirteen_parameters() -> None:
    # The paper's figure for a whole model.
    model = veneer.get_peft_model(llama(), TinyLoraConfig(u=13, weight_tying=1.0, target_modules="all-linear"))
    assert model.get_nb_trainable_parameters()[0] == 13


@pytest.mark.parametrize("save_projection", [False, True])
def test_files(save_projection: bool, tmp_path: Path) -> None:
    config = TinyLoraConfig(save_projection=save_projection, weight_tying=1.0, target_modules=["q_proj", "v_proj"])
    model = veneer.get_peft_model(llama(), config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1 + 4 * (3 if save_projection else 2)
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_dropout_acts_on_the_input_of_the_change_in_training() -> None:
    torch.manual_seed(0)
    config = TinyLoraConfig(tinylora_dropout=0.5, init_weights=False, target_modules=["0"])
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 3).double()), config)
    x = torch.zeros(50, 4).double()
    x[:, 0] = 1
    with model.disable_adapter():
        base = model(x)
    full = (model.eval()(x) - base)[0]
    y = model.train()(x) - base
    assert {tuple(row) for row in (y / full).detach().round(decimals=6).tolist()} == {(0.0,) * 3, (2.0,) * 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0; a positive whole number"),
        ({"u": 0}, "u=0; a positive whole number"),
        ({"weight_tying": 1.5}, "weight_tying=1.5; a number from 0 to 1"),
        ({"tinylora_dropout": 1.0}, "tinylora_dropout=1.0; a share"),
        ({"init_weights": "normal"}, "init_weights='normal'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyLoraConfig(**settings)
