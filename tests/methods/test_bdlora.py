"""BD-LoRA against the paper and peft."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, VeneerWarning
from veneer.methods.bdlora import BdLora

ANY = ["layer"]  # the contract's places all stand in a module of this name
SETTINGS = [
    {"r": 4, "lora_alpha": 7, "use_bdlora": {"target_modules_bd_a": ANY, "nblocks": 2}},
    {"r": 4, "lora_alpha": 3, "use_bdlora": {"target_modules_bd_b": ANY, "nblocks": 2}, "use_rslora": True},
    {"r": 3, "lora_alpha": 7, "use_bdlora": {"match_strict": False}},
    {"r": 2, "lora_alpha": 3, "use_bdlora": {"target_modules_bd_a": ANY, "nblocks": 2}, "lora_bias": True},
]
BOTH = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj", "v_proj"], "nblocks": 2}
SOME = {"target_modules_bd_b": ["layer.0.", "output"], "nblocks": 4, "match_strict": False}
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "lora_alpha": 7, "use_bdlora": BOTH}),
    ("bert", {"r": 4, "lora_alpha": 7, "use_rslora": True, "use_bdlora": SOME}),
]


def on(layer: nn.Module, **settings: Any) -> tuple[veneer.PeftModel, BdLora]:
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, BdLora)
    return model, adapter


@pytest.mark.parametrize("side", ["a", "b"])
def test_blocks_by_hand(side: str) -> None:
    layer = nn.Linear(4, 6, bias=False).double()
    nn.init.zeros_(layer.weight)
    model, adapter = on(layer, r=2, lora_alpha=6, use_bdlora={f"target_modules_bd_{side}": ["0"], "nblocks": 2})
    with torch.no_grad():
        if side == "a":
            adapter.down.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            adapter.up.copy_(torch.arange(12).view(6, 2))
            down, up = [[1.0, 2, 0, 0], [0, 0, 3, 4]], torch.arange(12).view(6, 2).tolist()
        else:
            adapter.down.copy_(torch.arange(8).view(2, 4))
            adapter.up.copy_(torch.arange(1, 7).view(6, 1))
            down, up = torch.arange(8).view(2, 4).tolist(), [[1, 0], [2, 0], [3, 0], [0, 4], [0, 5], [0, 6]]
    change = 3 * torch.tensor(up, dtype=torch.float64) @ torch.tensor(down, dtype=torch.float64)
    torch.testing.assert_close(adapter.adapt(layer.weight), change)
    torch.testing.assert_close(model(torch.eye(4, dtype=torch.float64)), change.t())
    expected = 2 * (4 // 2 + 6) if side == "a" else 2 * (4 + 6 // 2)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == expected


def test_the_start_is_that_of_peft() -> None:
    _, adapter = on(nn.Linear(400, 60), r=40, use_bdlora={"target_modules_bd_a": ["0"], "nblocks": 4})
    bound = (6 / 100) ** 0.5
    assert 0.99 * bound < adapter.down.abs().max().item() <= bound
    assert not adapter.up.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 3, "use_bdlora": {"target_modules_bd_a": ["0"], "nblocks": 2}}, r"nblocks=2 .* r=3 and \(6, 4\)"),
        ({"use_bdlora": {"target_modules_bd_a": ["0"], "nblocks": 8}}, r"nblocks=8 .* r=8 and \(6, 4\)"),
        ({"use_bdlora": {}}, r"0 is named neither by target_modules_bd_a nor by .*match_strict=False"),
        ({"use_bdlora": {"target_modules_bd_a": ["0"], "target_modules_bd_b": [""]}}, "0 is named by .*_a and .*_b"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}}, r"\['q'\] in both lists"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks=0; a positive"),
        (
            {"use_bdlora": {"target_modules_bd_a": ["0"]}, "init_lora_weights": "orthogonal"},
            "init_lora_weights='orthogonal': blocks start",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on(nn.Linear(4, 6), **settings)


def test_idle_names_are_pointed_out() -> None:
    with pytest.warns(VeneerWarning, match=r"target_modules_bd_b: \['up'\] match none"):
        on(nn.Linear(4, 6), use_bdlora={"target_modules_bd_a": ["0"], "target_modules_bd_b": ["up"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on(nn.Linear(4, 6), use_bdlora={"target_modules_bd_a": ["0"]})
