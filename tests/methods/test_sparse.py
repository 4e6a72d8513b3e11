"""Sparse masks: which entries each criterion chooses, by hand, and what is trained of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tiny import bert, llama, randomise, tokens
from veneer import get_peft_model, parse_method
from veneer.adapted import adapters_of
from veneer.errors import CheckpointError, ConfigError, StateError
from veneer.methods.sparse import SparseConfig

SETTINGS = [
    {"density": 0.3},
    {"density": 0.4, "criterion": "random", "scope": "neuron"},
    {"count": 3, "criterion": "magnitude"},
    {"density": 0.3, "criterion": "fisher", "scope": "model"},
]


class Two(nn.Module):
    """Two layers whose gradients are known: the loss is linear in both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2, bias=False).double()
        self.b = nn.Linear(3, 2, bias=False).double()
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[9.0, 1.0, -2.0], [3.0, -4.0, 0.5]]))
            self.b.weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return (self.a(x) * at).sum() + 0.1 * (self.b(x) * at).sum()


# By each of two examples, the gradient of `a` is the outer product of `at` and x, and that of `b` a tenth of it.
X = torch.tensor([[1.0, 2.0, 0.0], [1.0, -2.0, 3.0]], dtype=torch.float64)
AT = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
GRADIENTS = AT[:, :, None] * X[:, None, :]  # (example, out, in)


def prepared(**settings: Any) -> dict[str, list[int]]:
    """The chosen entries of each layer."""
    model = get_peft_model(Two(), SparseConfig(target_modules=["a", "b"], **settings))
    veneer.prepare(model, [(X, AT)], loss=lambda model, batch: model(*batch))
    found = {wrapper.path: adapter for wrapper, adapter in adapters_of(model, "default")}
    assert all(torch.equal(adapter.values, torch.zeros(len(adapter.indices)).double()) for adapter in found.values())
    return {path: adapter.indices.tolist() for path, adapter in found.items()}


def best(score: Tensor, count: int) -> list[int]:
    return sorted(score.flatten().topk(count).indices.tolist())


def test_gradient() -> None:
    total = GRADIENTS.sum(0).abs()
    assert prepared(criterion="gradient", count=2) == {"a": best(total, 2), "b": best(total, 2)}
    assert prepared(criterion="gradient", count=3, scope="model") == {"a": best(total, 3)}  # and nothing on `b`


def test_snip_weighs_the_gradient_by_the_weight() -> None:
    weight = Two().a.weight.detach()
    score = (GRADIENTS.sum(0) * weight).abs()
    assert best(score, 2) != best(GRADIENTS.sum(0).abs(), 2)
    assert prepared(criterion="snip", density=0.34)["a"] == best(score, 2)


def test_fisher_adds_up_the_squares_of_single_examples() -> None:
    score = GRADIENTS.square().sum(0)
    assert best(score, 3) != best(GRADIENTS.sum(0).square(), 3)  # two examples cancel each other out in the sum
    assert prepared(criterion="fisher", scope="model", density=0.25) == {"a": best(score, 3)}


def test_gps_takes_the_best_of_every_neuron() -> None:
    total = GRADIENTS.sum(0).abs()
    rows = [3 * row + int(total[row].argmax()) for row in range(2)]
    assert prepared(criterion="gradient", scope="neuron", count=1) == {"a": rows, "b": rows}
    config = parse_method("gps")
    assert (config.criterion, config.scope, config.count) == ("gradient", "neuron", 1)


def test_magnitude_and_random() -> None:
    model = get_peft_model(Two(), SparseConfig(target_modules=["a"], count=2))
    ((_, adapter),) = adapters_of(model, "default")
    assert adapter.indices.tolist() == [0, 4]
    model = get_peft_model(Two(), SparseConfig(target_modules=["a"], count=4, criterion="random"))
    ((_, adapter),) = adapters_of(model, "default")
    assert len(set(adapter.indices.tolist())) == 4


@pytest.mark.parametrize("name", ["snip", "fish_mask", "gps"])
def test_published_masks_train_and_load(name: str, tmp_path: Any) -> None:
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 2, 1])}
    model = get_peft_model(bert(), {"name": name, "task_type": "SEQ_CLS", "target_modules": "all-linear"}).train()
    with pytest.raises(StateError, match=r"veneer\.prepare"):
        model(**batch)
    sites = [adapter.site for _, adapter in adapters_of(model, "default") if adapter.site is not None]
    total, rows = sum(site.shape[0] * site.shape[1] for site in sites), sum(site.shape[0] for site in sites)
    before = bert().state_dict()
    veneer.prepare(model, [batch])
    after = copy.deepcopy(model).unload().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.training
    head = 32 * 3 + 3
    expected = {"snip": int(0.01 * total), "fish_mask": int(0.005 * total), "gps": rows}[name]
    assert model.get_nb_trainable_parameters()[0] == expected + head
    model(**batch).loss.backward()
    randomise(model)
    model.eval().save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_bare_call_before_preparing_is_the_base_model() -> None:
    model = get_peft_model(llama(), SparseConfig(criterion="snip")).eval()
    assert torch.equal(model(tokens()).logits, llama()(tokens()).logits)


def test_positions_that_do_not_fit_are_refused() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), SparseConfig(target_modules=["0"], count=2))
    state = veneer.get_peft_model_state_dict(model)
    for wrong in ([0, 6], [3, 1], [1, 1]):
        changed = {k: torch.tensor(wrong, dtype=v.dtype) if k.endswith("indices") else v for k, v in state.items()}
        with pytest.raises(CheckpointError, match="no rising positions"):
            veneer.set_peft_model_state_dict(model, changed)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"density": 0.0}, "density=0.0; a positive"),
        ({"density": 1.5}, "density=1.5; a share"),
        ({"count": 0}, "count=0; a positive"),
        ({"scope": "model"}, "says nothing of one layer against another"),
        ({"criterion": "fish"}, "did you mean|Did you mean"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SparseConfig(**settings)
