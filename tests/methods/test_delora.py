"""DeLoRA against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.delora import DeloraConfig

SETTINGS: list[dict[str, Any]] = [{"r": 3, "delora_lambda": 2}, {"r": 2, "delora_lambda": 0.5}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "delora_lambda": 7}),
    ("llama", {"r": 3, "rank_pattern": {"v_proj": 2}, "lambda_pattern": {"q_proj": 3}}),
    ("bert", {"r": 3}),
    ("t5", {"r": 3}),
    ("perceptron", {"r": 3, "target_modules": ["lin0", "lin1"]}),
]


def one_layer(**settings: Any) -> tuple[nn.Module, Any]:
    """W = [[3, 0], [4, 1]], whose columns are 5 and 1 long."""
    layer = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    model = get_peft_model(nn.Sequential(layer), DeloraConfig(r=1, delora_lambda=2, target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    return model, adapter


def test_the_formula_by_hand() -> None:
    model, adapter = one_layer()
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[3.0, 4.0]]))
        adapter.up.copy_(torch.tensor([[0.0], [0.5]]))
    # The change is 2 / (5 * .5) * [[0, 0], [1.5, 2]] = [[0, 0], [1.2, 1.6]], its columns times 5 and 1.
    expected = torch.tensor([[3.0, 0.0], [10.0, 2.6]], dtype=torch.float64)
    assert torch.allclose(model(torch.eye(2, dtype=torch.float64)), expected.t(), rtol=1e-12)


def test_the_bound_holds_for_any_factors() -> None:
    layer = nn.Linear(8, 6).double()
    with torch.no_grad():
        layer.weight.div_(torch.linalg.vector_norm(layer.weight, dim=0))  # columns of length 1
    model = get_peft_model(nn.Sequential(layer), "delora:r=3,delora_lambda=2,target_modules=['0']")
    ((_, adapter),) = adapters_of(model, "default")
    for scale in (1e-2, 1.0, 1e3):
        with torch.no_grad():
            adapter.down.normal_().mul_(scale)
            adapter.up.normal_().mul_(scale)
        change = adapter.adapt(adapter.site.read()) - adapter.site.read()
        assert torch.linalg.matrix_norm(change) <= 2 + 1e-9


def test_the_number_of_parameters() -> None:
    model = get_peft_model(llama(), "delora:r=2,target_modules=[q_proj]")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * (32 + 32) + 1)


def test_dropout_drops_from_the_change_alone() -> None:
    model, adapter = one_layer(module_dropout=0.5, init_weights=False)
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[3.0, 4.0]]))
        adapter.up.copy_(torch.tensor([[0.0], [0.5]]))
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    seen = {tuple(round(value, 9) for value in model.train()(x)[0].tolist()) for _ in range(32)}
    assert seen == {(3.0, 4.0), (3.0, 16.0)}


def test_a_rank_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="r=0"):
        DeloraConfig(r=0)
