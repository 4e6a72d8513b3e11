"""DoRA against the paper and peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of

SETTINGS = [
    {"r": 3, "lora_alpha": 7},
    {"r": 2, "lora_alpha": 3, "use_rslora": True},
    {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "lora_alpha": 7}),
    ("gpt2", {"r": 3, "lora_alpha": 7, "use_rslora": True}),
    ("bert", {"r": 3, "lora_alpha": 7}),
    ("perceptron", {"r": 3, "lora_alpha": 7}),
    ("convolutions", {"r": 3, "lora_alpha": 7}),
]


def test_lengths_and_directions_by_hand() -> None:
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=1, lora_alpha=2, use_dora=True, target_modules=["0"]))
    ((_, adapter),) = adapters_of(model, "default")
    assert torch.equal(adapter.magnitude, torch.tensor([3.0, 1.0], dtype=torch.float64))
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[0.0, 2.0]]))
        adapter.up.copy_(torch.tensor([[1.0], [0.0]]))
        adapter.magnitude.copy_(torch.tensor([10.0, 2.0]))
    # W + 2 up down = [[3, 4], [0, 1]], whose rows are 5 and 1 long; the bias is not scaled.
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(model(x), torch.tensor([[10 * 7 / 5 + 0.5, 2 - 0.5]], dtype=torch.float64), rtol=1e-12)
