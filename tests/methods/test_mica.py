"""MiCA against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError

SETTINGS = [{"r": 3, "lora_alpha": 7}, {"r": 2, "lora_alpha": 3, "use_rslora": True, "lora_bias": True}]
PARITY: list[tuple[str, dict[str, Any]]] = []


def test_minor_directions_by_hand() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.5]]))
    config = LoraConfig(r=1, lora_alpha=2, init_lora_weights="mica", target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    torch.testing.assert_close(adapter.up.abs(), torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["down"]
    with torch.no_grad():
        adapter.down.copy_(adapter.up.sum() * torch.tensor([[0.0, 5.0, 0.0]]))
    # 2 * up down = [[0, 0, 0], [0, 10, 0]]
    x = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.tensor([[3.0, 10.5]], dtype=torch.float64))
    assert sum(p.numel() for p in adapter.parameters()) == 1 * 3


def test_a_rank_above_that_of_the_weight_is_refused() -> None:
    config = LoraConfig(r=3, init_lora_weights="mica", target_modules=["0"])
    with pytest.raises(ConfigError, match=r"r=3, but the layer is \(2, 5\); at most 2"):
        get_peft_model(nn.Sequential(nn.Linear(5, 2)), config)


def test_it_cannot_be_combined_with_other_variants() -> None:
    config = LoraConfig(init_lora_weights="mica", use_dora=True, target_modules=["0"])
    with pytest.raises(ConfigError, match="use_dora and init_lora_weights cannot be combined"):
        get_peft_model(nn.Sequential(nn.Linear(5, 9)), config)
