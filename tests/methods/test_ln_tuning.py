"""LN-tuning against the paper and peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny import bert, llama, randomise
from veneer import BitFitConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.methods.ln_tuning import LNTuningConfig

PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": None}),
    ("gpt2", {"target_modules": ["ln_1", "ln_2", "ln_f"]}),
    ("bert", {"target_modules": ["LayerNorm"]}),
    ("t5", {"target_modules": None}),
    ("vit", {"target_modules": ["layernorm_before", "layernorm"]}),
    ("perceptron", {"target_modules": ["norm"]}),
]


def test_scale_and_bias_by_hand() -> None:
    layer = nn.LayerNorm(2, eps=0).double()
    model = get_peft_model(nn.Sequential(layer), LNTuningConfig())
    ((_, adapter),) = adapters_of(model, "default")
    with torch.no_grad():
        adapter.layer.weight.copy_(torch.tensor([2.0, 3.0]))
        adapter.layer.bias.copy_(torch.tensor([0.5, -0.5]))
    # (1, 3) has mean 2 and deviation 1, so that it is normalised to (-1, 1).
    x = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    assert torch.equal(model(x), torch.tensor([[-1.5, 2.5]], dtype=torch.float64))


def test_all_norms_and_nothing_else() -> None:
    assert get_peft_model(llama(), LNTuningConfig()).get_nb_trainable_parameters()[0] == (2 * 2 + 1) * 32
    model = bert()
    norms = sum(p.numel() for name, p in model.named_parameters() if "LayerNorm" in name)
    assert get_peft_model(model, LNTuningConfig()).get_nb_trainable_parameters()[0] == norms


def test_running_statistics_are_kept_once() -> None:
    layer = nn.Sequential(nn.BatchNorm1d(3)).double()
    model = get_peft_model(layer, LNTuningConfig())
    randomise(model)
    x = torch.randn(5, 3, dtype=torch.float64) + 4
    model.train()(x)
    assert layer[0].base_layer.running_mean.abs().min() > 0
    expected = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)


def test_what_lies_below_is_added() -> None:
    model = get_peft_model(nn.Sequential(nn.LayerNorm(2)), BitFitConfig(target_modules=["0"]), "below")
    model.add_adapter("above", LNTuningConfig())
    model.set_adapter(["below", "above"])
    for name, values in (("below", [1.0, 2.0]), ("above", [10.0, 20.0])):
        for _, adapter in adapters_of(model, name):
            with torch.no_grad():
                (adapter.delta if name == "below" else adapter.layer.bias).copy_(torch.tensor(values))
    assert torch.equal(model(torch.zeros(1, 2)), torch.tensor([[11.0, 22.0]]))
