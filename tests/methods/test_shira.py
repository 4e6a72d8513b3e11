"""SHiRA against the paper and peft."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from parity.oracle import peft_says
from tiny import llama, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.shira import ShiraConfig

SETTINGS = [{"r": 2}, {"r": 3, "random_seed": 7}, {"r": 2, "init_weights": False}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3}),
    ("bert", {"r": 3, "random_seed": 7}),
    ("t5", {"r": 2}),
    ("perceptron", {"r": 2, "target_modules": ["lin0", "lin1"]}),
]


def test_values_are_added_at_their_indices() -> None:
    layer = nn.Linear(4, 3).double()
    before = layer.weight.detach().clone()
    model = get_peft_model(nn.Sequential(layer), ShiraConfig(r=1, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    assert adapter.values.shape == (1 * (4 + 3),)  # section 3: as many as LoRA of rank 1
    with torch.no_grad():
        adapter.indices.copy_(torch.arange(7))
        adapter.values.copy_(torch.arange(1.0, 8.0))
    before[0] += torch.arange(1.0, 5.0)
    before[1, :3] += torch.arange(5.0, 8.0)
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ before.t() + layer.bias)
    torch.testing.assert_close(model.merge_and_unload()[0].weight.data, before)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_random_mask_is_that_of_peft(seed: int | None) -> None:
    settings = {"r": 2, "random_seed": seed, "target_modules": ["q_proj", "v_proj"]}
    here = get_peft_model(llama(), ShiraConfig(**settings))
    with peft_says():
        there = peft.get_peft_model(llama(), peft.ShiraConfig(**settings))
    ours, theirs = veneer.get_peft_model_state_dict(here), peft.get_peft_model_state_dict(there)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key])


def test_a_mask_of_ones_own_is_saved_by_its_indices(tmp_path: Any) -> None:
    def first(layer: nn.Module, r: int) -> Tensor:
        out, fan_in = layer.weight.shape
        return (torch.arange(out * fan_in) < r * (out + fan_in)).view(out, fan_in).to(layer.weight)

    config = ShiraConfig(r=2, mask_type="first", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="mask_fn"):
        get_peft_model(llama(), config)
    config.mask_fn = first
    model = get_peft_model(llama(), config)
    for _, adapter in adapters_of(model, "default"):
        assert torch.equal(adapter.indices, torch.arange(2 * 64, dtype=torch.int32))
        nn.init.normal_(adapter.values)
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_rank_that_asks_for_more_than_there_is() -> None:
    with pytest.raises(ConfigError, match=r"r=17 asks for 1088 entries .* \(32, 32\).* has 1024. Set r to 16"):
        get_peft_model(llama(), ShiraConfig(r=17, target_modules=["q_proj"]))


def test_no_dense_tensor_is_kept_for_the_gradient() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), ShiraConfig(r=1, target_modules=["0"]))
    weight = model.get_base_model()[0].base_layer.weight
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 64, requires_grad=True))
    assert {t.data_ptr() for t in kept if t.numel() >= 64 * 64} == {weight.data_ptr()}
