"""AdapterPlus against its formula, and the paper's count."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import transformers as T
from torch import nn

from tiny import randomise
from veneer import get_peft_model
from veneer.adapted import adapters_of

SETTINGS = [{"bottleneck_size": 3, "drop_path": 0.0}, {"bottleneck_size": 2, "non_linearity": "relu", "drop_path": 0.0}]


def vit(**sizes: int) -> nn.Module:
    return T.ViTForImageClassification(T.ViTConfig(**sizes))


def test_the_end_of_a_block_is_scaled_by_channel() -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    holder = nn.Sequential(OrderedDict(block=block))
    model = get_peft_model(holder, "adapterplus:target_modules=[block],bottleneck_size=2").eval()
    randomise(model)
    ((_, adapter),) = adapters_of(model, "default")
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    h = block(x)
    inner = torch.nn.functional.gelu(h @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T
    torch.testing.assert_close(model(x), h + adapter.scaling * (inner + adapter.up.bias))


def test_rows_are_left_out_in_training() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Identity(), nn.Linear(4, 4)), "adapterplus:target_modules=['1'],drop_path=0.5"
    )
    randomise(model)
    x = torch.ones(64, 3, 4)
    base, whole = model.get_base_model()[1].frozen_layer(x), model.eval()(x)
    torch.manual_seed(0)
    change = (model.train()(x) - base) / (whole - base)
    per_row = change.mean((1, 2))
    assert torch.allclose(change, per_row.view(-1, 1, 1).expand_as(change), atol=1e-4)
    assert set(per_row.round(decimals=3).tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(("rank", "millions"), [(8, 0.20), (16, 0.35)])
def test_the_count_of_the_paper(rank: int, millions: float) -> None:
    """Steitz and Roth 2024, table 4, on ViT-B/16; with heads for the 940 classes of VTAB's 19 tasks, on average."""
    with torch.device("meta"):
        model = get_peft_model(vit(), f"adapterplus:bottleneck_size={rank}", low_cpu_mem_usage=True)
    trained = model.get_nb_trainable_parameters()[0]
    assert trained == 12 * (2 * 768 * rank + rank + 2 * 768)
    assert round((trained + 940 / 19 * 769) / 1e6, 2) == millions


def test_the_start() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = get_peft_model(vit(**sizes, image_size=8, patch_size=4), "adapterplus:bottleneck_size=64")
    ((_, adapter),) = adapters_of(model, "default")
    for layer in (adapter.down, adapter.up):
        assert 0.007 < layer.weight.std().item() < 0.01
        assert layer.weight.abs().max() <= 0.02
        assert not layer.bias.any()
    assert torch.equal(adapter.scaling, torch.ones(64))
