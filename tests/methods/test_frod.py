"""FRoD against its formula and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from tiny import llama, randomise, tokens
from veneer.adapted import adapters_of
from veneer.errors import CheckpointError, ConfigError
from veneer.methods.frod import FrodConfig, off_diagonal

SETTINGS = [{"sparse_rate": 0.2}, {"sparse_rate": 0.1, "save_projection": False, "projection_prng_key": 3}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"sparse_rate": 0.05}),
    ("gpt2", {"sparse_rate": 0.02, "projection_prng_key": 3, "target_modules": ["c_attn"]}),
    ("bert", {"sparse_rate": 0.1, "save_projection": False, "target_modules": ["query", "value"]}),
    ("perceptron", {"sparse_rate": 0.2, "regularization_alpha": 0.1, "target_modules": ["lin0", "lin1"]}),
]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def adapted(**settings: Any) -> veneer.PeftModel:
    model = veneer.get_peft_model(llama().double(), FrodConfig(target_modules=["q_proj", "k_proj"], **settings))
    randomise(model)
    return model.eval()


def test_the_formula_and_the_decomposition() -> None:
    model = adapted(sparse_rate=0.1)
    for wrapper, adapter in adapters_of(model, "default"):
        v, weight = adapter.shared.v(wrapper.path), adapter.site.read()
        torch.testing.assert_close(adapter.u @ adapter.start.diag() @ v.T, weight)
        torch.testing.assert_close(torch.linalg.vector_norm(adapter.u, dim=0), torch.ones(32).double())
        core = adapter.diagonal.diag()
        core[tuple(adapter.shared.s(wrapper.path))] = adapter.values
        expected = adapter.u @ core @ v.T
        for count in (3, 200):  # by its factors, and formed
            x = torch.randn(count, 32).double()
            torch.testing.assert_close(wrapper(x), nn.functional.linear(x, expected, wrapper.frozen_layer.bias))


def test_layers_of_one_category_share_directions_and_places() -> None:
    model = adapted(sparse_rate=0.1)
    names = [name for name in veneer.get_peft_model_state_dict(model) if "frod_V" in name]
    assert sorted(names) == ["base_model.frod_V.self_attn_k_proj", "base_model.frod_V.self_attn_q_proj"]


def test_the_parameter_count() -> None:
    model = adapted(sparse_rate=0.1)
    assert model.get_nb_trainable_parameters()[0] == 4 * (32 + int(0.1 * 32 * 32))


def test_places_are_off_the_diagonal_and_differ() -> None:
    places = off_diagonal(7, 1.0, torch.Generator().manual_seed(0))
    assert places.shape == (2, 42)
    assert (places[0] != places[1]).all()
    assert len(set(map(tuple, places.T.tolist()))) == 42
    assert off_diagonal(7, 0.0, torch.Generator()).shape == (2, 0)
    assert off_diagonal(7, 0.001, torch.Generator()).shape == (2, 1)


@pytest.mark.parametrize("save_projection", [False, True])
def test_files(save_projection: bool, tmp_path: Path) -> None:
    model = adapted(save_projection=save_projection)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 4 + (3 * 2 if save_projection else 0)
    loaded = veneer.PeftModel.from_pretrained(llama().double(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_places_outside_of_the_core_are_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "s_indices" in name)[0, 0] = 32
    save_file(tensors, file)
    for record in tmp_path.glob("*.sha256"):
        record.unlink()
    with pytest.raises(CheckpointError, match="a place outside of 32 x 32"):
        veneer.PeftModel.from_pretrained(llama().double(), tmp_path)


def test_the_core_with_its_gradients_is_that_of_the_formula() -> None:
    wrapper, adapter = next(iter(adapters_of(adapted(sparse_rate=0.1), "default")))
    v, parameters = adapter.shared.v(wrapper.path), [adapter.diagonal, adapter.values]
    for count in (3, 200):
        x, g = torch.randn(count, 32).double().requires_grad_(), torch.randn(count, wrapper.site.shape[0]).double()
        expected = x @ (adapter.u @ adapter.core() @ v.T + adapter.site.read()).T
        wanted = torch.autograd.grad(expected, [x, *parameters], g)
        for found, gradient in zip(torch.autograd.grad(wrapper(x), [x, *parameters], g), wanted, strict=True):
            torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)])
def test_dropout_acts_on_the_input_of_the_change_in_training(layer: nn.Module) -> None:
    torch.manual_seed(0)
    config = FrodConfig(frod_dropout=0.5, sparse_rate=0.3, init_weights=False, target_modules=["0"])
    model = veneer.get_peft_model(nn.Sequential(layer.double()), config)
    x = torch.zeros(50, 4, *[1] * (layer.weight.dim() - 2)).double()
    x[:, 0] = 1
    with model.disable_adapter():
        base = model(x)
    full = (model.eval()(x) - base)[0]
    y = model.train()(x) - base
    ratios = (y / full).detach().flatten(1).round(decimals=6)
    assert {tuple(row) for row in ratios.tolist()} == {(0.0,) * 3, (2.0,) * 3}


def test_a_weight_without_full_rank_is_decomposed() -> None:
    layer = nn.Linear(4, 6).double()
    with torch.no_grad():
        layer.weight[:, 2:] = 0
    model = veneer.get_peft_model(nn.Sequential(layer), FrodConfig(target_modules=["0"]))
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(model(x), layer(x))
    assert all(p.isfinite().all() for p in model.parameters())


def test_layers_of_one_category_have_one_width() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3)), "b": nn.Sequential(nn.Linear(3, 3))})
    model = nn.ModuleDict({k: nn.ModuleDict({"block": nn.ModuleDict({"lin": v[0]})}) for k, v in model.items()})
    with pytest.raises(ConfigError, match=r"block_lin of all layers together, but a\.block\.lin has 2 inputs"):
        veneer.get_peft_model(model, FrodConfig(target_modules=["lin"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_rate": 1.5}, "sparse_rate=1.5; a share from 0 to 1"),
        ({"frod_dropout": 1.0}, "frod_dropout=1.0; a share"),
        ({"runtime_offload_base_weight": True}, "runtime_offload_base_weight=True"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrodConfig(**settings)
