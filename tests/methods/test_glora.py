"""GLoRA against the paper and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from parity.families import FAMILIES
from parity.oracle import output, peft_says
from tiny import llama, randomise
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.glora import GloraConfig

SETTINGS: list[dict[str, Any]] = [
    {"r": 3},
    {"r": 2, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3}),
    ("bert", {"r": 3, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    ("bert", {"r": 3, "config_A_B": "constant", "config_C": "vector"}),
    ("perceptron", {"r": 3, "target_modules": ["lin0"]}),
]


def one_layer(settings: str, bias: bool = True) -> tuple[nn.Module, Any]:
    """W = [[1, 2], [3, 4]], b = [1, -1]."""
    layer = nn.Linear(2, 2, bias=bias).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        if bias:
            layer.bias.copy_(torch.tensor([1.0, -1.0]))
    model = get_peft_model(nn.Sequential(layer), f"glora:target_modules=['0'],{settings}")
    ((_, adapter),) = adapters_of(model, "default")
    return model, adapter


def fill(adapter: Any, **values: Any) -> None:
    with torch.no_grad():
        for name, value in values.items():
            adapter.get_parameter(name.replace("_", ".")).copy_(torch.tensor(value))


def test_the_formula_by_hand() -> None:
    model, adapter = one_layer("r=1")
    fill(adapter, A_Xd=[[1.0], [0.0]], A_Xu=[[2.0, 3.0]], B_Xd=[[0.0], [1.0]], B_Xu=[[5.0, 6.0]])
    fill(adapter, C_Xd=[[1.0], [2.0]], C_Xu=[[10.0]], D_X=[0.5], E_X=[0.25])
    # W * A = [[2, 6], [0, 0]], B = [[0, 0], [5, 6]]; b D + E = [.75, -.25], W C = [50, 110].
    weight = torch.tensor([[3.0, 8.0], [8.0, 10.0]], dtype=torch.float64)
    bias = torch.tensor([51.75, 108.75], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ weight.t() + bias, rtol=1e-12, atol=1e-12)


def test_vectors_by_hand() -> None:
    model, adapter = one_layer("config_A_B=vector,config_C=vector,config_D_E=vector")
    fill(adapter, A_X=[[1.0], [2.0]], B_X=[[3.0], [4.0]], C_X=[[1.0], [2.0]], D_X=[1.0, 2.0], E_X=[0.5, 0.25])
    weight = torch.tensor([[5.0, 7.0], [13.0, 16.0]], dtype=torch.float64)
    bias = torch.tensor([2.5 + 5, -2.75 + 11], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ weight.t() + bias, rtol=1e-12, atol=1e-12)


def test_the_number_of_parameters() -> None:
    model = get_peft_model(llama(attention_bias=True), "glora:r=3,target_modules=[q_proj]")
    each = 2 * 3 * (32 + 32) + 3 * (32 + 1) + 2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * each


@pytest.mark.parametrize("settings", [{"r": 3}, {"config_A_B": "none", "config_C": "vector"}])
def test_supports_that_are_zero_are_in_files_of_peft_only(settings: dict[str, Any], tmp_path: Path) -> None:
    kind = FAMILIES["perceptron"]  # lin1 has no bias
    values = {"target_modules": ["lin0", "lin1"], **settings}
    with peft_says("Found missing adapter keys"):
        there = peft.get_peft_model(kind.model(), peft.GloraConfig(**values)).eval()
        randomise(there)
        x = kind.inputs()
        there.save_pretrained(str(tmp_path / "theirs"))
        here = veneer.PeftModel.from_pretrained(kind.model(), tmp_path / "theirs")
        torch.testing.assert_close(output(here, x), output(there, x), rtol=1e-9, atol=1e-10)
        here.save_pretrained(tmp_path / "ours")
        loaded = peft.PeftModel.from_pretrained(kind.model(), str(tmp_path / "ours"))
        torch.testing.assert_close(output(loaded, x), output(there, x), rtol=1e-9, atol=1e-10)


def test_layers_without_bias_get_none() -> None:
    model, adapter = one_layer("r=1", bias=False)
    assert {name for name, _ in adapter.named_parameters()} == {"A.Xd", "A.Xu", "B.Xd", "B.Xu"}
    assert model.merge_and_unload()[0].bias is None


def test_forms_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="config_D_E='lora'"):
        GloraConfig(config_D_E="lora")  # type: ignore[arg-type]
