"""VeLoRA against the paper and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer
from veneer import LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.velora import Velora

# Groups of one input are kept exactly, so that gradients are those of the definition.
SETTINGS = [
    {"r": 3, "lora_alpha": 7},
    {"r": 2, "lora_alpha": 3, "velora_config": {"num_groups": 8}, "use_rslora": True, "lora_bias": True},
]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 3, "lora_alpha": 7, "velora_config": {"num_groups": 8}}),
    ("llama", {"r": 3, "lora_alpha": 7, "velora_config": {"num_groups": 5, "scale": 0.7}, "use_rslora": True}),
    ("bert", {"r": 3, "lora_alpha": 7, "velora_config": {"num_groups": 8, "init_type": "batch_average_once"}}),
    ("bert", {"r": 3, "lora_alpha": 7, "velora_config": {"num_groups": 8, "init_type": "random"}}),
]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # peft normalises in float32


def on(layer: nn.Module, **settings: Any) -> tuple[veneer.PeftModel, Velora]:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"], velora_config=settings)
    model = get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, Velora)
    nn.init.normal_(adapter.up)
    return model, adapter


@pytest.mark.parametrize(("groups", "size"), [(2, 3), (4, 2), (5, 1)])
def test_the_gradient_by_hand(groups: int, size: int) -> None:
    torch.manual_seed(0)
    model, adapter = on(nn.Linear(5, 4).double(), num_groups=groups, scale=0.5)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    (model(x) * weights).sum().backward()
    padded = F.pad(x.detach().view(6, 5), (0, groups * size - 5)).view(6, groups, size)
    direction = padded.mean((0, 1)) / padded.mean((0, 1)).norm()
    assert adapter.direction.shape == (size,)
    torch.testing.assert_close(adapter.direction, direction)
    z = (padded * direction).sum(-1)  # (tokens, groups)
    kept = 0.5 * (z[..., None] * direction).view(6, -1)[:, :5]
    hidden_grad = 3 * weights.view(6, 4) @ adapter.up
    torch.testing.assert_close(adapter.down.grad, hidden_grad.t() @ kept)
    if size == 1:
        torch.testing.assert_close(kept, 0.5 * x.detach().view(6, 5))
    # What flows on to the input, and what up gets, is exact.
    weight = adapter.adapt(adapter.site.read())
    torch.testing.assert_close(x.grad, weights @ weight)
    torch.testing.assert_close(adapter.up.grad, 3 * weights.view(6, 4).t() @ (x.detach().view(6, 5) @ adapter.down.t()))


def test_only_the_compressed_input_is_kept() -> None:
    model, _ = on(nn.Linear(32, 4), num_groups=4)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(torch.randn(7, 32))
    assert (7, 4) in kept
    assert (7, 32) not in kept


def test_outside_training_nothing_moves_and_gradients_are_exact() -> None:
    model, adapter = on(nn.Linear(6, 4).double(), num_groups=2)
    x = torch.randn(3, 6, dtype=torch.float64)
    model.eval()(x).sum().backward()
    exact = 3 * adapter.up.sum(0)[:, None] * x.sum(0)
    torch.testing.assert_close(adapter.down.grad, exact)
    assert not adapter.direction.any()
    with torch.no_grad():
        model.train()(x)
    assert not adapter.direction.any()


@pytest.mark.parametrize(("kind", "moves"), [("batch_average", True), ("batch_average_once", False), ("random", False)])
def test_which_batches_give_the_direction(kind: str, moves: bool, tmp_path: Path) -> None:
    base = nn.Linear(6, 4)
    model, adapter = on(base, num_groups=2, init_type=kind)
    model(torch.randn(3, 6))
    first = adapter.direction.clone()
    assert first.norm().item() == pytest.approx(1)
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(nn.Sequential(base), tmp_path, is_trainable=True).train()
    for each in (model, loaded):
        ((_, adapter),) = adapters_of(each, "default")
        assert torch.equal(adapter.direction, first)
        each(torch.randn(3, 6))
        assert torch.equal(adapter.direction, first) != moves


def test_without_any_direction_all_ones_are_taken() -> None:
    model, adapter = on(nn.Linear(6, 4), num_groups=2)
    model(torch.zeros(2, 6))
    torch.testing.assert_close(adapter.direction, torch.full((3,), 3**-0.5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_groups": 0}, "num_groups=0, scale=1.0; positive"),
        ({"scale": 0.0}, "scale=0.0; positive"),
        ({"init_type": "batch_averag"}, r"init_type='batch_averag'; one of .*Did you mean 'batch_average'"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(velora_config=given)
