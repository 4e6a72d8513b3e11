"""LoRA against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tiny import llama
from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError

SETTINGS = [
    {"r": 3, "lora_alpha": 7},
    {"r": 2, "lora_alpha": 5, "use_rslora": True},
    {"r": 3, "lora_alpha": 7, "lora_bias": True},
    {"r": 2, "lora_alpha": 3, "init_lora_weights": "gaussian"},
    {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"},
]


def one_layer(**settings: object) -> tuple[nn.Linear, nn.Module, object]:
    """W = [[1, 2], [3, 4]], b = [1, -1], and LoRA on it with down = [[1, 0], [1, 1]], up = [[1, 2], [0, 1]]."""
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, lora_alpha=6, **settings))
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        adapter.up.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        if adapter.bias is not None:
            adapter.bias.copy_(torch.tensor([10.0, 20.0]))
    return layer, model, adapter


def test_the_formula() -> None:
    # up down = [[3, 2], [1, 1]]; s = 6 / 2 = 3; W' = [[10, 8], [6, 7]]; at x = (1, -1): W'x + b = (2, -1) + (1, -1)
    _, model, _ = one_layer()
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(model(x), torch.tensor([[3.0, -2.0]], dtype=torch.float64))


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    _, model, _ = one_layer(use_rslora=True)
    s = 6 / math.sqrt(2)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1 + 3 * s + 1, 3 + 1 * s - 1]], dtype=torch.float64)
    torch.testing.assert_close(model(x), expected)


def test_the_bias_is_scaled_too_and_is_merged() -> None:
    _, model, _ = one_layer(lora_bias=True)
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    expected = torch.tensor([[3.0 + 30.0, -2.0 + 60.0]], dtype=torch.float64)
    assert torch.equal(model(x), expected)
    merged = model.merge_and_unload()
    assert torch.equal(merged[0].weight, torch.tensor([[10.0, 8.0], [6.0, 7.0]], dtype=torch.float64))
    assert torch.equal(merged[0].bias, torch.tensor([31.0, 59.0], dtype=torch.float64))


def test_the_parameter_count_of_the_paper() -> None:
    # Hu et al., section 4.2: 2 r d for every adapted d x d matrix.
    model = get_peft_model(llama(num_key_value_heads=4), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    layers, matrices, width, rank = 2, 2, 32, 4
    assert model.get_nb_trainable_parameters()[0] == 2 * layers * matrices * width * rank


def test_patterns_give_places_their_own_rank_and_alpha() -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        alpha_pattern={"^model.layers.0.self_attn.k_proj": 20},
    )
    model = get_peft_model(llama(), config)
    found = {w.path: (a.down.shape[0], a.scaling) for w, a in adapters_of(model, "default")}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 4.0)
    assert found["model.layers.0.self_attn.k_proj"] == (4, 5.0)
    assert found["model.layers.0.mlp.up_proj"] == (4, 2.0)
    assert found["model.layers.1.mlp.up_proj"] == (6, 8 / 6)


def test_dropout_drops_the_input_of_down_only() -> None:
    torch.manual_seed(0)
    _, model, _ = one_layer(lora_dropout=0.5)
    x = torch.ones(200, 2, dtype=torch.float64)
    model.train()
    y = model(x)
    base = torch.tensor([3.0 + 1, 7.0 - 1], dtype=torch.float64)
    # Each input is 0 or 2, so the delta is 3 * up down (0 or 2, 0 or 2): one of four values.
    deltas = {tuple(row) for row in (y - base).tolist()}
    assert deltas == {(0.0, 0.0), (18.0, 6.0), (12.0, 6.0), (30.0, 12.0)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0; a positive whole number"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\]=-1"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0; a share"),
        ({"init_lora_weights": "gausian"}, "Did you mean 'gaussian'"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho=0.5"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


def test_bare_parameters_have_neither_dropout_nor_bias() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for settings in ({"lora_dropout": 0.1}, {"lora_bias": True}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            get_peft_model(model, LoraConfig(target_parameters=["0.weight"], **settings))
