"""PVeRA against the paper and peft."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from contract.evaluating import hold
from contract.places import SPOTS, Spot
from tiny import llama
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, UnsupportedError
from veneer.methods.pvera import Pvera, PveraConfig

SETTINGS: list[dict[str, Any]] = []  # random in training: see `test_promises_outside_of_training`
HERE = {"r": 3, "d_initial": 0.3}
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 5, "generator_seed": 3}),
    ("gpt2", {"r": 5, "projection_prng_key": 3, "generator_seed": 4}),
    ("bert", {"r": 5, "save_projection": False, "generator_seed": 5}),
    ("perceptron", {"r": 5, "generator_seed": 6, "target_modules": ["lin0", "lin1"]}),
]


def on(layer: nn.Module, **settings: Any) -> tuple[veneer.PeftModel, Any]:
    model = veneer.get_peft_model(nn.Sequential(layer), PveraConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    nn.init.normal_(adapter.b)
    nn.init.normal_(adapter.d)
    return model, adapter


@pytest.mark.parametrize("spot", [s for s in SPOTS if s.kind in Pvera.kinds], ids=lambda spot: spot.name)
def test_promises_outside_of_training(spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    further = ("test_fast_forward_is_the_definition", "test_it_compiles_to_one_graph")
    hold("pvera", HERE, spot, tmp_path, monkeypatch, further)


@pytest.mark.parametrize("spot", [s for s in SPOTS if s.kind in Pvera.kinds], ids=lambda spot: spot.name)
def test_promises_in_training(spot: Spot) -> None:
    from contract import test_contract

    test_contract.test_it_starts_as_the_base_layer("pvera", HERE, spot)
    test_contract.test_only_adapters_are_trained("pvera", HERE, spot)


@pytest.mark.parametrize("settings", [{}, {"sample_at_inference": True}])
def test_the_distribution_of_the_outputs(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, adapter = on(nn.Linear(3, 2, bias=False).double(), r=2, **settings)
    x = torch.randn(3).double()
    mean, log_variance = (adapter.d * (adapter.shared.down @ x)).chunk(2)
    factor = adapter.b[:, None] * adapter.shared.up
    expected = adapter.site.read() @ x + factor @ mean
    covariance = factor @ log_variance.exp().diag() @ factor.T
    batch = x.expand(50_000, 3)
    for random in (model.train(), model.eval() if settings else None):
        if random is not None:
            y = random(batch)
            torch.testing.assert_close(y.mean(0), expected, rtol=0.02, atol=0.02)
            torch.testing.assert_close(y.T.cov(), covariance, rtol=0.05, atol=0.02)
    if not settings:
        torch.testing.assert_close(model.eval()(x), expected)


def test_a_seed_repeats_the_draws() -> None:
    x = torch.randn(4, 3)
    model, _ = on(nn.Linear(3, 2), r=2, generator_seed=5)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    for twin in twins:
        assert torch.equal(twin(x), first)
        assert torch.equal(twin(x), second)


def test_what_is_drawn_at_inference_does_not_merge() -> None:
    model, _ = on(nn.Linear(3, 2), r=2, sample_at_inference=True)
    with pytest.raises(UnsupportedError, match=r"sample_at_inference=True: .*cannot be merged"):
        model.merge_adapter()


def test_the_parameter_count() -> None:
    config = PveraConfig(r=64, target_modules=["q_proj", "v_proj"])
    model = veneer.get_peft_model(llama(num_key_value_heads=4), config)
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (32 + 2 * 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 0}, "r=0; a positive whole number"), ({"pvera_dropout": 1.0}, "pvera_dropout=1.0; a share")],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PveraConfig(**settings)
