"""Lily against the paper and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tiny import llama, randomise, tokens
from veneer import PeftModel, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, UnsupportedError
from veneer.methods.lily import LilyConfig

SETTINGS: list[dict[str, Any]] = [{"r": 3, "scaling": 2.0}, {"r": 2, "num_B": 3, "stride_A": 2}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "scaling": 0.5}),
    ("bert", {"r": 3, "num_B": 3, "stride_A": 2}),
    ("t5", {"r": 3, "stride_A": 3}),
    ("llama", {"r": 3, "target_modules": r".*\.(q_proj|o_proj|v_proj)", "stride_A": 2}),
]


def test_the_formula_by_hand() -> None:
    layer = nn.Linear(2, 2).double()
    model = get_peft_model(nn.Sequential(layer), "lily:r=1,num_B=2,scaling=3,target_modules=['0']")
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.shared.down[0].copy_(torch.tensor([[1.0, 2.0]]))
        adapter.shared.up[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
        adapter.router.copy_(torch.tensor([[1.0], [0.0]]))
    x = torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    # h = 3 and -1; the first up has the shares e^3 / (e^3 + 1) and e^-1 / (e^-1 + 1), of which all get the mean.
    hidden = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    share = torch.sigmoid(hidden).mean().item()
    change = 3 * hidden * torch.tensor([share, 5 * (1 - share)], dtype=torch.float64)
    torch.testing.assert_close(model(x), layer(x) + change, rtol=1e-12, atol=1e-12)


def test_what_is_shared_counts_once() -> None:
    model = get_peft_model(llama(num_hidden_layers=5), "lily:r=4,num_B=3,stride_A=2,target_modules=[q_proj,v_proj]")
    adapters = [adapter for _, adapter in adapters_of(model, "default")]
    assert len({id(adapter.shared) for adapter in adapters}) == 1
    downs = 3 * (4 * 32) * 2  # three of five layers, queries and values apart
    ups, routers = 3 * 4 * (32 + 16), 10 * 3 * 4
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == downs + ups + routers
    chosen = [adapter.down_number for adapter in adapters if adapter.up_number == adapters[0].up_number]
    assert len(set(chosen)) == 3
    assert chosen[0] == chosen[1] != chosen[2] == chosen[3] != chosen[4]


def test_loaded_places_share_again(tmp_path: Any) -> None:
    model = get_peft_model(llama(), "lily:r=4,stride_A=2,target_modules=[q_proj,v_proj]")
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == count


def test_it_cannot_be_merged() -> None:
    model = get_peft_model(llama(), "lily:r=4")
    with pytest.raises(UnsupportedError, match="Lily adapters cannot be merged"):
        model.merge_adapter()


def test_one_up_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_B=1"):
        LilyConfig(num_B=1)
