"""Super-Tuning against its definition and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import veneer
from tiny import llama, randomise, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.supertuning import SupertuningConfig

SETTINGS = [
    {"sparsity": 0.75},
    {"sparsity": 0.8, "select_top": False, "save_precomputed_indices": False},
    {"sparsity": 0.75, "r": 2, "lora_alpha": 5},
    {"sparsity": 0.75, "r": 2, "init_weights": False},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"sparsity": 0.9}),
    ("bert", {"sparsity": 0.95, "r": 3, "lora_alpha": 7}),
    ("t5", {"sparsity": 0.9, "select_top": False, "r": 2}),
    ("llama", {"sparsity": 0.9, "save_precomputed_indices": False}),
    ("perceptron", {"sparsity": 0.8, "target_modules": ["lin0", "lin1"]}),
]


def adapted(**settings: Any) -> tuple[veneer.PeftModel, Any]:
    layer = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -5.0, 1.0], [4.0, 0.2, -0.3]]))
    model = get_peft_model(nn.Sequential(layer), SupertuningConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    return model, adapter


def test_the_largest_entries_are_trained_or_the_smallest() -> None:
    model, adapter = adapted(sparsity=0.5)
    assert adapter.indices.tolist() == [1, 2, 3]
    with torch.no_grad():
        adapter.values.copy_(torch.tensor([10.0, 20.0, 30.0]))
    expected = torch.tensor([[0.1, 5.0, 21.0], [34.0, 0.2, -0.3]])
    torch.testing.assert_close(model(torch.eye(3, dtype=torch.float64)).t().float(), expected)
    assert adapted(sparsity=0.5, select_top=False)[1].indices.tolist() == [0, 4, 5]


def test_a_low_rank_product_stands_beside_them() -> None:
    model, adapter = adapted(sparsity=0.8, r=1, lora_alpha=3)
    with torch.no_grad():
        adapter.values.copy_(torch.tensor([10.0]))
        adapter.low_rank.down.copy_(torch.tensor([[1.0, 0.0, 2.0]]))
        adapter.low_rank.up.copy_(torch.tensor([[1.0], [-1.0]]))
    expected = torch.tensor([[0.1 + 3, 5.0, 1.0 + 6], [4.0 - 3, 0.2, -0.3 - 6]])
    torch.testing.assert_close(model(torch.eye(3, dtype=torch.float64)).t().float(), expected)


def test_as_many_values_as_the_sparsity_leaves() -> None:
    model = get_peft_model(llama(), SupertuningConfig(sparsity=0.99, target_modules=["q_proj", "down_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * (10 + 15)  # 1% of 32 x 32 and of 32 x 48


def test_files_without_indices_are_smaller_and_the_same_adapter(tmp_path: Any) -> None:
    models = [
        get_peft_model(llama(), SupertuningConfig(sparsity=0.9, save_precomputed_indices=save))
        for save in (True, False)
    ]
    for model in models:
        randomise(model)
    kept, found = (veneer.get_peft_model_state_dict(model) for model in models)
    assert {key for key in kept if key not in found} == {key for key in kept if key.endswith("indices")}
    models[1].save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, models[0](tokens()).logits)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity": 0.9}, "leaves no entry"),
        ({"sparsity": 1.0}, r"sparsity=1.0; a share in \[0, 1\)"),
        ({"lora_alpha": 8}, "only `r` asks for"),
        ({"r": 0}, "r=0; a positive"),
    ],
)
def test_settings_that_contradict_themselves(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        adapted(**settings)
