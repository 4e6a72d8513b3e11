"""RandLoRA against the paper and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer
from parity.families import Perceptron
from tiny import llama, randomise, tokens
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.randlora import RandLoraConfig

SETTINGS = [
    {"r": 4, "randlora_alpha": 6},
    {"r": 2, "randlora_alpha": 3, "sparse": True, "save_projection": False},
    {"r": 3, "randlora_alpha": 4, "very_sparse": True, "projection_prng_key": 3},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 5, "randlora_alpha": 7}),
    ("gpt2", {"r": 4, "randlora_alpha": 6, "sparse": True, "save_projection": False, "projection_prng_key": 3}),
    ("bert", {"r": 4, "randlora_alpha": 6, "very_sparse": True}),
    ("t5", {"r": 9, "randlora_alpha": 7, "save_projection": False}),
    ("perceptron", {"r": 4, "randlora_alpha": 3, "target_modules": ["lin0", "lin1"]}),
]


def one_layer(out_features: int, in_features: int, **settings: Any) -> tuple[Any, Any]:
    layer = nn.Linear(in_features, out_features, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = veneer.get_peft_model(nn.Sequential(layer), RandLoraConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return model, adapter


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_the_formula(shape: tuple[int, int]) -> None:
    model, adapter = one_layer(*shape, r=3, randlora_alpha=6)
    short, bases = 4, 2
    a, b = adapter.shared.a[:, 0], adapter.shared.b.flatten(1).view(7, 3, bases)
    total = sum(b[:, :, j] @ adapter.rows[:, j].diag() @ a @ adapter.columns[j].diag() for j in range(bases))
    assert total.shape == (7, short)
    expected = 2 * (total if shape == (7, 4) else total.T)
    for count in (1, 20):  # run like LoRA, and formed
        x = torch.randn(count, shape[1]).double()
        torch.testing.assert_close(model(x), x @ expected.T)


def test_the_change_has_full_rank() -> None:
    _, adapter = one_layer(9, 8, r=2, randlora_alpha=2)
    assert torch.linalg.matrix_rank(adapter.adapt(adapter.site.read())) == 8


def test_the_parameter_count_of_the_paper() -> None:
    # Albert et al., section 4.2: n (r + d) with n = d / r.
    config = RandLoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    model = veneer.get_peft_model(llama(num_key_value_heads=4), config)
    assert model.get_nb_trainable_parameters()[0] == 4 * 4 * (8 + 32)


@pytest.mark.parametrize(("settings", "zeros"), [({}, 0.0), ({"sparse": True}, 2 / 3), ({"very_sparse": True}, 0.9)])
def test_bases_are_normalised_and_as_sparse_as_asked(settings: dict[str, Any], zeros: float) -> None:
    _, adapter = one_layer(100, 100, r=10, **settings)
    for base in (adapter.shared.a, adapter.shared.b):
        assert base.std().item() == pytest.approx(1, abs=0.01)
        assert (base == 0).double().mean().item() == pytest.approx(zeros, abs=0.03)


def test_bases_are_saved_once_or_not_at_all(tmp_path: Path) -> None:
    for save_projection, count in ((True, 2 + 2 * 4), (False, 2 * 4)):
        config = RandLoraConfig(r=8, save_projection=save_projection, target_modules=["q_proj", "v_proj"])
        model = veneer.get_peft_model(llama(), config).eval()
        randomise(model)
        model.save_pretrained(tmp_path)
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == count
        loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path).eval()
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_files_of_peft_repeat_the_bases_for_every_layer(tmp_path: Path) -> None:
    model = peft.get_peft_model(Perceptron(), peft.RandLoraConfig(r=4, target_modules=["lin0", "lin1"]))
    model.save_pretrained(str(tmp_path))
    assert sum("randlora_A" in name for name in load_file(tmp_path / "adapter_model.safetensors")) == 3
    loaded = veneer.PeftModel.from_pretrained(Perceptron(), tmp_path)
    assert sum("randlora_A" in name for name in veneer.get_peft_model_state_dict(loaded)) == 1


def test_dropout_acts_on_the_input_of_the_change_in_training() -> None:
    torch.manual_seed(0)
    model, _ = one_layer(6, 6, r=2, randlora_dropout=0.5)
    x = torch.zeros(50, 6).double()
    x[:, 0] = 1
    full = model.eval()(x)[0]
    y = model.train()(x)
    assert {tuple(row) for row in (y / full).detach().round(decimals=6).tolist()} == {(0.0,) * 6, (2.0,) * 6}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 0}, "r=0; a positive whole number"), ({"randlora_dropout": 1.0}, "randlora_dropout=1.0; a share")],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RandLoraConfig(**settings)
