"""GraLoRA against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from contract.places import Spot
from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.gralora import GraloraConfig

SETTINGS: list[dict[str, Any]] = [{"r": 4, "alpha": 7}, {"r": 2, "alpha": 3, "hybrid_r": 3}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "alpha": 7}),
    ("gpt2", {"r": 4, "alpha": 7, "gralora_k": 4, "hybrid_r": 3}),
    ("bert", {"r": 6, "alpha": 7, "hybrid_r": 2}),
    ("perceptron", {"r": 4, "alpha": 7, "target_modules": ["lin0", "lin1"]}),
]


def fits(settings: dict[str, Any], spot: Spot) -> bool:
    return spot.name != "Conv2d, depthwise"  # 9 inputs


def test_the_formula_by_hand() -> None:
    layer = nn.Linear(4, 4, bias=False).double()
    model = get_peft_model(nn.Sequential(layer), "gralora:r=2,alpha=6,hybrid_r=1,target_modules=['0']")
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        for i, tensor in enumerate((adapter.down, adapter.up, adapter.wide_down, adapter.wide_up)):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + i)
    down, up = adapter.down, adapter.up
    change = torch.zeros(4, 4, dtype=torch.float64)
    for m in range(2):
        for n in range(2):
            for o in range(2):
                for i in range(2):
                    # the rank of a block is 1: column m of the inputs' factor, row n of the outputs'
                    change[2 * m + o, 2 * n + i] = down[n, i, m] * up[m, n, o]
    change += adapter.wide_up @ adapter.wide_down
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (layer.weight + 6 / 3 * change).t(), rtol=1e-12, atol=1e-12)


def test_the_rank_and_the_number_of_parameters() -> None:
    model = get_peft_model(llama(), "gralora:r=4,gralora_k=4,target_modules=[q_proj],init_weights=false")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (32 + 32)
    ((_, adapter), *_) = adapters_of(model, "default")
    assert torch.linalg.matrix_rank(adapter.change()) == 4 * 4


def test_dropout_drops_from_the_change_alone() -> None:
    for layer, x in ((nn.Linear(4, 4), torch.randn(2, 4)), (nn.Conv1d(2, 4, 2), torch.randn(2, 2, 5))):
        model = get_peft_model(nn.Sequential(layer), "gralora:r=2,gralora_dropout=0.5,target_modules=['0']")
        torch.testing.assert_close(model.train()(x), layer(x))
        ((_, adapter),) = adapters_of(model, "default")
        nn.init.ones_(adapter.up)
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 3}, "gralora_k=2 does not divide r=3"),
        ({"hybrid_r": -1}, "hybrid_r=-1"),
        ({"gralora_k": 0}, "gralora_k=0"),
        ({"gralora_dropout": 1.0}, "gralora_dropout=1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GraloraConfig(**settings)
