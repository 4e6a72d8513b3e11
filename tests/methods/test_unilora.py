"""Uni-LoRA against the paper and peft."""

from __future__ import annotations

import copy
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
from veneer.methods.unilora import UniLoraConfig

SETTINGS = [{"r": 3, "theta_d_length": 10}, {"r": 2, "theta_d_length": 7, "proj_seed": 3, "save_indices": True}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "theta_d_length": 50}),
    ("gpt2", {"r": 3, "theta_d_length": 33, "save_indices": True, "proj_seed": 5}),
    ("bert", {"r": 2, "theta_d_length": 100, "init_weights": False}),
    ("perceptron", {"r": 2, "theta_d_length": 9, "target_modules": ["lin0", "lin1"]}),
]


def test_the_formula() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    nn.init.zeros_(layer.weight)
    config = UniLoraConfig(r=1, theta_d_length=2, target_modules=["0"])
    model = veneer.get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    theta = torch.tensor([3.0, 5.0]).double()
    with torch.no_grad():
        adapter.shared.unilora_theta_d.copy_(theta)
        adapter.indices_down.copy_(torch.tensor([[0, 1, 1]]))
        adapter.indices_up.copy_(torch.tensor([[1], [0]]))
        adapter.shared.scale.copy_(torch.tensor([2.0, 3.0]).double().rsqrt())
    a, b = 3 / 2**0.5, 5 / 3**0.5
    expected = torch.tensor([[b * a, b * b, b * b], [a * a, a * b, a * b]]).double()
    torch.testing.assert_close(model(torch.eye(3).double()).T, expected)


def test_the_projection_is_an_isometry() -> None:
    # Li et al., theorem 1: the factors of all layers together are as long as theta.
    config = UniLoraConfig(r=4, theta_d_length=100, target_modules=["q_proj", "v_proj", "down_proj"])
    model = veneer.get_peft_model(llama().double(), config)
    factors = [factor for _, adapter in adapters_of(model, "default") for factor in adapter.factors()]
    theta = next(adapters_of(model, "default"))[1].shared.unilora_theta_d
    torch.testing.assert_close(
        sum(factor.square().sum() for factor in factors), theta.square().sum(), rtol=1e-6, atol=0
    )


def test_the_parameter_count_of_the_paper() -> None:
    model = veneer.get_peft_model(llama(), UniLoraConfig(theta_d_length=77, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 77


@pytest.mark.parametrize("save_indices", [False, True])
def test_files_hold_the_vector_and_the_indices_where_asked(save_indices: bool, tmp_path: Path) -> None:
    config = UniLoraConfig(theta_d_length=77, save_indices=save_indices, target_modules=["q_proj", "v_proj"])
    model = veneer.get_peft_model(llama(), config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == (1 + 4 * 4 if save_indices else 1)
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_indices_of_a_file_win_over_the_seed() -> None:
    settings: dict[str, Any] = {"theta_d_length": 77, "target_modules": ["q_proj", "v_proj"]}
    first = veneer.get_peft_model(llama(), UniLoraConfig(save_indices=True, **settings)).eval()
    second = veneer.get_peft_model(llama(), UniLoraConfig(proj_seed=1, **settings)).eval()
    veneer.set_peft_model_state_dict(second, veneer.get_peft_model_state_dict(first))
    assert torch.equal(second(tokens()).logits, first(tokens()).logits)
    twin = copy.deepcopy(second)
    assert torch.equal(twin(tokens()).logits, first(tokens()).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0; a positive whole number"),
        ({"theta_d_length": 0}, "theta_d_length=0; a positive whole number"),
        ({"init_theta_d_bound": 0.0}, "init_theta_d_bound=0.0; a positive number"),
        ({"unilora_dropout": 1.0}, "unilora_dropout=1.0; a share"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UniLoraConfig(**settings)
