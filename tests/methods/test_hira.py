"""HiRA against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.hira import HiraConfig

SETTINGS: list[dict[str, Any]] = [{"r": 3}, {"r": 2, "init_weights": "gaussian"}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3}),
    ("gpt2", {"r": 3}),
    ("bert", {"r": 3}),
    ("perceptron", {"r": 3}),
    ("convolutions", {"r": 3}),
]


def one_layer(**settings: Any) -> tuple[nn.Module, Any]:
    """W = [[1, 2], [3, 4]], b = [1, -1]; down = [[1, 2]], up = [[3], [-1]]."""
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    model = get_peft_model(nn.Sequential(layer), HiraConfig(r=1, target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.up.copy_(torch.tensor([[3.0], [-1.0]]))
    return model, adapter


def test_the_formula_by_hand() -> None:
    model, _ = one_layer()
    # up down = [[3, 6], [-1, -2]]; W + W * that = [[4, 14], [0, -4]].
    x = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    assert torch.equal(model(x), torch.tensor([[145.0, -41.0]], dtype=torch.float64))


def test_dropout_acts_on_the_change_alone() -> None:
    model, _ = one_layer(hira_dropout=0.5)
    x = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    seen = {tuple(model.train()(x)[0].tolist()) for _ in range(64)}
    # The layer gives (22, 42); the change (3, -3) and (120, -80), each twice as large or gone.
    assert seen == {(22.0, 42.0), (28.0, 36.0), (262.0, -118.0), (268.0, -124.0)}
    assert model.eval()(x)[0].tolist() == [145.0, -41.0]


def test_the_number_of_parameters_and_the_rank_of_the_change() -> None:
    model = get_peft_model(llama(), "hira:r=2,target_modules=[q_proj],init_weights=false")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * (32 + 32)
    ((_, adapter), *_) = adapters_of(model, "default")
    weight = adapter.site.read()
    assert torch.linalg.matrix_rank(adapter.adapt(weight) - weight) > 2


def test_ranks_of_single_places() -> None:  # which peft passes over
    model = get_peft_model(llama(), "hira:r=3,rank_pattern={v_proj: 2},target_modules=[q_proj,v_proj]")
    assert [adapter.down.shape[0] for _, adapter in adapters_of(model, "default")] == [3, 2, 3, 2]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"r=0"):
        HiraConfig(r=0)
    with pytest.raises(ConfigError, match=r"init_weights='orthogonal'"):
        HiraConfig(init_weights="orthogonal")  # type: ignore[arg-type]
