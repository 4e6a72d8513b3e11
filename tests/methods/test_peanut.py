"""PEANuT against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.peanut import PeanutConfig

SETTINGS: list[dict[str, Any]] = [{"r": 3, "act_fn": "gelu"}, {"r": 2, "depth": 2, "scaling": 0.5, "act_fn": "tanh"}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3}),
    ("bert", {"r": 3, "depth": 1, "scaling": 0.7, "act_fn": "silu"}),
    ("t5", {"r": 3, "depth": 3, "act_fn": "gelu"}),
    ("perceptron", {"r": 3, "target_modules": ["lin0", "lin1"]}),
]


def test_the_formula_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 1.0]]))
    model = get_peft_model(nn.Sequential(layer), "peanut:r=1,depth=1,scaling=2,target_modules=['0']")
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[3.0, 1.0]]))
        adapter.encoders[0].fill_(-1.0)
        adapter.decoders[0].fill_(4.0)
        adapter.up.copy_(torch.tensor([[1.0], [10.0]]))
    # down W = [5, -2], relu [5, 0]; encoder [-5, 0], relu [0, 0]; decoder [0, 0], plus [5, 0]; W + 2 up of that.
    expected = torch.tensor([[11.0, -1.0], [102.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(model(torch.eye(2, dtype=torch.float64)), expected.t(), rtol=1e-12, atol=1e-12)


def test_the_number_of_parameters() -> None:
    model = get_peft_model(llama(), "peanut:r=4,depth=2,target_modules=[v_proj]")  # 16 outputs
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * 4 * 16 + 2 * 2 * 4 * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"depth": -1}, "depth=-1"),
        ({"act_fn": "rleu"}, "act_fn='rleu' is no activation of transformers"),
        ({"act_fn": "xielu"}, "act_fn='xielu' has parameters of its own"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PeanutConfig(**settings)
