"""KaSA against the paper and peft."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from tiny import bert, randomise, tokens
from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.kasa import Kasa, KasaConfig

SETTINGS = [
    {"r": 3, "lora_alpha": 7},
    {"r": 2, "lora_alpha": 3, "use_rslora": True, "lora_bias": True},
]
QUIET = {"beta": 0.0, "gamma": 0.0}  # peft leaves the terms of the loss to the caller
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "lora_alpha": 7, "kasa_config": QUIET}),
    ("bert", {"r": 3, "lora_alpha": 7, "use_rslora": True, "kasa_config": QUIET}),
    ("vit", {"r": 3, "lora_alpha": 7, "kasa_config": QUIET, "target_modules": ["q_proj", "v_proj"]}),
]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # peft decomposes the weight in float32


def on(layer: nn.Module, **settings: Any) -> tuple[veneer.PeftModel, Kasa]:
    config = LoraConfig(**{"kasa_config": KasaConfig(), "target_modules": ["0"], **settings})
    model = get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, Kasa)
    return model, adapter


def test_the_smallest_values_go_and_others_come_by_hand() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.5]]))
    model, adapter = on(layer, r=1, lora_alpha=2)
    x = torch.tensor([[1.0, 10.0, 100.0]], dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.tensor([[3.0, 0.0]], dtype=torch.float64))
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[0.0, 1.0, 0.0]]))
        adapter.up.copy_(torch.tensor([[1.0], [2.0]]))
        adapter.values.fill_(5.0)
    # 2 * up 5 down = [[0, 10, 0], [0, 20, 0]]
    torch.testing.assert_close(model(x), torch.tensor([[103.0, 200.0]], dtype=torch.float64))
    with model.disable_adapter():
        assert torch.equal(model(x), torch.tensor([[3.0, 50.0]], dtype=torch.float64))
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 1 * (3 + 2 + 1)


def test_dropout_leaves_what_is_taken_out_alone() -> None:
    layer = nn.Linear(6, 5).double()
    model, adapter = on(layer, r=2, lora_dropout=0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model.eval()(x)  # up is zero
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-10, atol=1e-10)
    nn.init.normal_(adapter.up)
    assert not torch.allclose(model(x), model.eval()(x))


def test_the_terms_of_the_loss_by_hand() -> None:
    _, adapter = on(nn.Linear(4, 3).double(), r=2, kasa_config={"beta": 0.5, "gamma": 0.25})
    with torch.no_grad():
        adapter.values.copy_(torch.tensor([1.0, 2.0]))
        adapter.up.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))  # orthonormal
        adapter.down.copy_(torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]))  # 1 - gram = diag(-3, -8)
    term = Kasa.penalty([adapter, adapter], adapter.config)
    assert term is not None
    assert term.item() == pytest.approx(2 * (0.5 * 5 + 0.25 * 73**0.5), rel=1e-12)


def test_the_loss_is_that_of_peft_with_its_terms() -> None:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"], "kasa_config": {"beta": 0.3}}
    here = get_peft_model(bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0), LoraConfig(**settings))
    randomise(here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.get_peft_model(
            bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0), peft.LoraConfig(**settings)
        )
        peft.set_peft_model_state_dict(there, veneer.get_peft_model_state_dict(here))
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 2, 1])}
    expected = there.train()(**batch).loss + there.base_model._get_kasa_loss()
    torch.testing.assert_close(here.train()(**batch).loss, expected)
    torch.testing.assert_close(here.eval()(**batch).loss, there.eval()(**batch).loss)


def test_a_rank_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"r=3, but the layer is \(3, 5\); a smaller rank"):
        on(nn.Linear(5, 3), r=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, r"kasa_config=3; a KasaConfig or a mapping"),
        ({"beat": 1}, r"KasaConfig has no setting 'beat'\. Did you mean 'beta'"),
        ({"beta": "x"}, r"KasaConfig: beta='x'; float was expected"),
        ({"gamma": -1.0}, r"gamma=-1\.0; zero or more"),
    ],
)
def test_settings_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(kasa_config=given)


def test_it_cannot_be_combined_with_other_variants() -> None:
    with pytest.raises(ConfigError, match="use_dora and kasa_config cannot be combined"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(use_dora=True, kasa_config={}, target_modules=["0"]))
