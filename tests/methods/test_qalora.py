"""QA-LoRA against the paper and peft."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

import veneer
from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.qalora import QaLora

SETTINGS = [
    {"r": 3, "lora_alpha": 7, "qalora_group_size": 2},
    {"r": 2, "lora_alpha": 3, "qalora_group_size": 4, "use_rslora": True, "lora_bias": True},
]


def on(layer: nn.Module, **settings: Any) -> tuple[veneer.PeftModel, QaLora]:
    config = LoraConfig(use_qalora=True, target_modules=["0"], **settings)
    model = get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, QaLora)
    return model, adapter


def test_groups_share_a_column_by_hand() -> None:
    layer = nn.Linear(6, 2, bias=False).double()
    nn.init.zeros_(layer.weight)
    model, adapter = on(layer, r=1, lora_alpha=5, qalora_group_size=3)
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[1.0, 10.0]]))
        adapter.up.copy_(torch.tensor([[1.0], [2.0]]))
    # s = 5, c = 2 groups / size 3; the groups of x sum to 6 and 15
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], dtype=torch.float64)
    expected = 5 * 2 / 3 * (6 * 1 + 15 * 10) * torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(model(x), expected)
    change = adapter.adapt(layer.weight)[0]
    torch.testing.assert_close(change, 10 / 3 * torch.tensor([1.0, 1, 1, 10, 10, 10], dtype=torch.float64))
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 6 // 3 + 2


def test_it_is_what_peft_computes_on_quantised_layers() -> None:
    layer = nn.Linear(12, 5).double()
    model, adapter = on(layer, r=3, lora_alpha=7, qalora_group_size=4)
    nn.init.normal_(adapter.up)
    theirs = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=adapter.down)},
        lora_B={"a": SimpleNamespace(weight=adapter.up)},
        lora_dropout={"a": nn.Identity()},
        scaling={"a": 7 / 3},
        qalora_group_size={"a": 4},
        in_features=12,
        training=False,
    )
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = QALoraLinearVariant.forward(theirs, "a", x, layer(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [0, -2, 4])
def test_groups_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"qalora_group_size={size}, but the layer has 6 inputs; a divisor"):
        on(nn.Linear(6, 2), qalora_group_size=size)
