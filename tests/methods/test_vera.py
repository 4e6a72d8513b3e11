"""VeRA against the paper and peft, and what sharing tensors between places means."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from tiny import llama, randomise, tokens
from veneer.adapted import adapters_of
from veneer.errors import CheckpointError, ConfigError
from veneer.methods.vera import VeraConfig

SETTINGS = [{"r": 5, "d_initial": 0.3}, {"r": 3, "save_projection": False, "projection_prng_key": 7}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 5}),
    ("gpt2", {"r": 5, "projection_prng_key": 3}),
    ("bert", {"r": 5, "save_projection": False}),
    ("t5", {"r": 5, "d_initial": 1.0}),
    ("perceptron", {"r": 5, "target_modules": ["lin0", "lin1"]}),
]


def adapted(**settings: Any) -> veneer.PeftModel:
    model = veneer.get_peft_model(llama(), VeraConfig(r=5, target_modules=["q_proj", "down_proj"], **settings))
    randomise(model)
    return model.eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def test_the_formula() -> None:
    layer = nn.Linear(2, 2, bias=False).double()
    nn.init.eye_(layer.weight)
    model = veneer.get_peft_model(nn.Sequential(layer), VeraConfig(r=2, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.shared.down.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        adapter.shared.up.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
        adapter.d.copy_(torch.tensor([2.0, 3.0]))
        adapter.b.copy_(torch.tensor([10.0, 1.0]))
    # d A = [[2, 4], [0, 3]]; B d A = [[2, 7], [4, 8]]; b B d A = [[20, 70], [4, 8]]
    assert torch.equal(model(torch.eye(2).double()).T, torch.tensor([[21.0, 70.0], [4.0, 9.0]]).double())


def test_projections_are_uniform_as_for_rectifiers_and_follow_from_the_key() -> None:
    first, again, other = (
        next(adapters_of(adapted(projection_prng_key=key), "default"))[1].shared for key in (0, 0, 1)
    )
    assert torch.equal(first.up, again.up)
    assert not torch.equal(first.up, other.up)
    assert first.down.shape == (5, 48)  # the widest input is down_proj's
    assert first.up.shape == (32, 5)
    assert first.down.abs().max() <= math.sqrt(6 / 48)


def test_the_parameter_count_of_the_paper() -> None:
    # Kopiczko et al., section 3.2: L (d_model + r).
    model = veneer.get_peft_model(llama(num_key_value_heads=4), VeraConfig(r=64, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (32 + 64)


def test_all_places_share_one_tensor_in_memory_and_in_the_file(tmp_path: Path) -> None:
    model = adapted()
    assert len({id(adapter.shared) for _, adapter in adapters_of(model, "default")}) == 1
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in names if "vera_A" in name] == ["base_model.vera_A"]
    assert len(names) == 2 + 2 * 4


def test_projections_that_are_not_saved_are_drawn_again(tmp_path: Path) -> None:
    model = adapted(save_projection=False, projection_prng_key=5)
    model.save_pretrained(tmp_path)
    assert not any("vera_A" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(output(veneer.PeftModel.from_pretrained(llama(), tmp_path).eval()), output(model))


def test_projections_of_a_file_win_over_the_key_and_are_expected_where_they_were_saved(tmp_path: Path) -> None:
    model, other = adapted(), adapted(projection_prng_key=1, save_projection=False)
    tensors = veneer.get_peft_model_state_dict(model)
    veneer.set_peft_model_state_dict(other, tensors)
    assert torch.equal(output(other), output(model))
    with pytest.raises(CheckpointError, match=r"missing base_model\.vera_A"):
        veneer.set_peft_model_state_dict(model, {k: v for k, v in tensors.items() if "vera_A" not in k})
    with pytest.raises(CheckpointError, match=r"vera_A has shape \(5, 3\), expected \(5, 48\)"):
        veneer.set_peft_model_state_dict(other, {**tensors, "base_model.vera_A": torch.ones(5, 3)})
    assert torch.equal(output(other), output(model))


def test_two_adapters_have_projections_of_their_own(tmp_path: Path) -> None:
    model = adapted()
    expected = output(model)
    model.add_adapter("wide", VeraConfig(r=7, projection_prng_key=3, target_modules=["down_proj", "lm_head"]))
    model.set_adapter("wide")
    randomise(model, 1)
    wide = output(model)
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path).eval()
    loaded.load_adapter(tmp_path / "wide", "wide")
    assert torch.equal(output(loaded), expected)
    loaded.set_adapter("wide")
    assert torch.equal(output(loaded), wide)
    loaded.delete_adapter("default")
    assert torch.equal(output(loaded), wide)


def test_copies_share_among_themselves_only() -> None:
    model = adapted()
    expected = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shared = {id(adapter.shared): adapter.shared for _, adapter in adapters_of(twin, "default")}
        assert len(shared) == 1
        with torch.no_grad():
            next(iter(shared.values())).up.zero_()
        assert torch.equal(output(model), expected)
        assert not torch.equal(output(twin), expected)


def test_without_a_wrapper_around_the_model(tmp_path: Path) -> None:
    model = adapted()
    tensors = veneer.get_peft_model_state_dict(model)
    bare = veneer.inject_adapter_in_model(VeraConfig(r=5, target_modules=["q_proj", "down_proj"]), llama())
    veneer.set_peft_model_state_dict(
        bare, {key.removeprefix("base_model.").removeprefix("model."): tensor for key, tensor in tensors.items()}
    )
    assert torch.equal(output(bare.eval()), output(model))
    assert len(veneer.get_peft_model_state_dict(bare)) == len(tensors)


def test_projections_follow_the_model_to_another_type(tmp_path: Path) -> None:
    model = adapted()
    expected = output(model)
    model.double()
    assert {p.dtype for p in next(adapters_of(model, "default"))[1].buffers()} == {torch.float64}
    torch.testing.assert_close(output(model).float(), expected)
    model.float()
    assert torch.equal(output(model), expected)
    half = veneer.get_peft_model(llama().bfloat16(), VeraConfig(r=5, target_modules=["q_proj", "down_proj"]))
    assert {b.dtype for b in next(adapters_of(half, "default"))[1].buffers()} == {torch.float32}
    assert output(half).dtype == torch.bfloat16


def test_dropout_acts_on_the_input_in_training() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    config = VeraConfig(r=1, vera_dropout=0.5, d_initial=1.0, target_modules=["0"])
    model = veneer.get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    nn.init.ones_(adapter.b)
    product = (adapter.shared.up @ adapter.shared.down).squeeze()
    y = model.train()(torch.ones(100, 1)).detach()
    assert all(value in (0, 2) for value in (y / product).round(decimals=4).unique())
    torch.testing.assert_close(model.eval()(torch.ones(1, 1)).squeeze(), product)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 0}, "r=0; a positive whole number"), ({"vera_dropout": 1.0}, "vera_dropout=1.0; a share")],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VeraConfig(**settings)


def test_bare_parameters_have_no_dropout() -> None:
    with pytest.raises(ConfigError, match=r"vera_dropout=0.1: a bare parameter"):
        veneer.get_peft_model(llama(), VeraConfig(vera_dropout=0.1, target_parameters=["q_proj.weight"]))
