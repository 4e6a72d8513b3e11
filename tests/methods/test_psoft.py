"""PSOFT against the paper and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from parity.families import FAMILIES
from parity.oracle import SINGLE, output, peft_says, same_tensors, tensors
from parity.test_training import train
from tiny import llama, randomise
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, VeneerWarning
from veneer.methods.psoft import PsoftConfig

SETTINGS: list[dict[str, Any]] = [
    {"r": 3, "psoft_alpha": 7},
    {"r": 4, "ab_svd_init": "pissa_init", "use_cayley_neumann": True, "cayley_neumann_eps": 0.5, "psoft_mag_a": False},
    {"r": 2, "psoft_orth": False, "psoft_mag_b": False, "psoft_svd": "lowrank"},
]

# peft decomposes in single precision only, so the comparison is made there.
PEFT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "psoft_alpha": 7}),
    ("bert", {"r": 5, "ab_svd_init": "pissa_init", "use_cayley_neumann": True, "cayley_neumann_eps": 0.5}),
    ("t5", {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "psoft_mag_a": False}),
    ("perceptron", {"r": 3, "target_modules": ["lin0", "lin1"], "psoft_orth": False, "psoft_mag_b": False}),
    ("llama", {"r": 4, "psoft_svd": "lowrank", "random_seed": 3}),
]


@pytest.mark.parametrize(("name", "changes"), PEFT)
def test_outputs_files_and_steps_are_those_of_peft(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = family.model(torch.float32)
    values = {"target_modules": family.targets, **family.settings, **changes}
    here = get_peft_model(family.model(torch.float32), PsoftConfig(**values)).eval()
    randomise(here)
    x = family.inputs(torch.float32)
    with peft_says():
        there = peft.get_peft_model(family.model(torch.float32), peft.PsoftConfig(**values)).eval()
        known = tensors(there)
        peft.set_peft_model_state_dict(there, {key: tensors(here)[key] for key in known})
        expected = output(there, x)
        torch.testing.assert_close(output(here, x), expected, **SINGLE)
        assert not torch.allclose(expected, output(base, x), rtol=1e-3)
        there.save_pretrained(str(tmp_path / "theirs"))
        here.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(family.model(torch.float32), str(tmp_path / "ours"))
    torch.testing.assert_close(output(again, x), expected, **SINGLE)
    loaded = veneer.PeftModel.from_pretrained(family.model(torch.float32), tmp_path / "theirs")
    torch.testing.assert_close(output(loaded, x), expected, **SINGLE)
    if family.labels is not None:
        assert train(here, family) == pytest.approx(train(there, family), rel=1e-4)
        after = tensors(here)
        same_tensors({key: after[key] for key in known}, tensors(there), rtol=1e-3, atol=1e-3)


def test_a_quarter_turn_by_hand() -> None:
    layer = nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    model = get_peft_model(nn.Sequential(layer), PsoftConfig(r=2, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.rotation.fill_(1.0)
        adapter.input_scale.copy_(torch.tensor([10.0, 1.0]))
        adapter.output_scale.copy_(torch.tensor([1.0, 5.0]))
    # The singular vectors are the axes, so W' = W diag(b) R diag(a), with R = cayley(-Q) = [[0, 1], [-1, 0]] up to the
    # signs of the two vectors, which turn both numbers round together.
    y = model(torch.eye(2, dtype=torch.float64)).t()
    torch.testing.assert_close(y.abs(), torch.tensor([[0.0, 3.0], [100.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert y[0, 1] * y[1, 0] < 0


def test_angles_and_lengths_of_neurons_are_kept() -> None:
    # With all singular values and without the scales, W' = U S R V^T with R orthogonal: W' W'^T = W W^T.
    layer = nn.Linear(6, 5).double()
    config = PsoftConfig(r=5, psoft_mag_a=False, psoft_mag_b=False, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    randomise(model)
    merged = model.merge_and_unload()[0].weight
    assert not torch.allclose(merged, layer.weight, rtol=0.1)
    torch.testing.assert_close(merged @ merged.t(), layer.weight @ layer.weight.t())


def test_as_many_parameters_as_the_paper_states() -> None:
    # r (r - 1) / 2 + 2 r for each layer, whatever its size.
    model = get_peft_model(llama(), PsoftConfig(r=6, target_modules=["q_proj", "down_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (6 * 5 // 2 + 2 * 6)


def test_signs_of_singular_vectors_are_those_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(6, 5).double())
    model = get_peft_model(layer, PsoftConfig(r=3, target_modules=["0"]))
    randomise(model)
    x = torch.randn(2, 6, dtype=torch.float64)
    expected = model(x)
    model.save_pretrained(tmp_path)
    svd = torch.linalg.svd

    def other(weight: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, ...]:
        u, s, vh = svd(weight, full_matrices=full_matrices)
        turned = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
        return u * turned, s, turned[:, None] * vh

    monkeypatch.setattr(torch.linalg, "svd", other)
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"k_proj: r=20, but the layer is \(16, 32\)"):
        get_peft_model(llama(), PsoftConfig(r=20, target_modules=["k_proj"]))
    with pytest.raises(ConfigError, match=r"cayley_neumann_eps=2\.0"):
        PsoftConfig(cayley_neumann_eps=2.0)
    with pytest.warns(VeneerWarning, match=r"without use_cayley_neumann they change nothing"):
        get_peft_model(llama(), PsoftConfig(r=2, num_cayley_neumann_terms=7))
