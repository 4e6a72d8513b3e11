"""LoRA+, LoRA-FA and the Riemannian optimiser against the papers and peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import veneer.optimizers as here
from contract.places import Experts
from parity.families import FAMILIES
from parity.oracle import peft_says, same_tensors, settings, tensors, twins
from parity.test_training import loss_of
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, UnsupportedError
from veneer.methods.lora import Lora

Make = Callable[[nn.Module], torch.optim.Optimizer]
PLUS = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 3e-4, "loraplus_weight_decay": 0.1}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, family: str) -> list[float]:
    model.train()
    losses = []
    for step in range(10):
        loss = loss_of(model, FAMILIES[family], step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("loraplus", lambda module, model: module.create_loraplus_optimizer(model, AdamW, **PLUS)),
        ("loraplus", lambda module, model: module.create_loraplus_optimizer(model, SGD, momentum=0.9, **PLUS)),
        ("lorafa", lambda module, model: module.create_lorafa_optimizer(model, 3, 7, 1e-2, 0.1)),
        ("riemannian", lambda module, model: module.create_riemannian_optimizer(model, AdamW, lr=1e-2, reg=0.05)),
        ("riemannian", lambda module, model: module.create_riemannian_optimizer(model, SGD, lr=1e-2)),
    ],
    ids=["loraplus-adamw", "loraplus-sgd", "lorafa", "riemannian-adamw", "riemannian-sgd"],
)
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("bert", {"use_rslora": True, "rank_pattern": {"query": 2}}), ("perceptron", {})],
)
def test_ten_steps_are_those_of_peft(name: str, how: Any, family: str, changes: dict[str, Any]) -> None:
    if name != "loraplus" and family == "perceptron":
        changes = {"target_modules": ["lin0", "lin1"]}  # peft leaves embeddings out, or trains their padding
    with peft_says():
        ours, theirs = twins(FAMILIES[family], settings(FAMILIES[family], **changes))
        for module in (*ours.modules(), *theirs.modules()):
            if isinstance(module, nn.Embedding):
                module.padding_idx = None
        before = {key: tensor.clone() for key, tensor in tensors(ours).items()}
        losses = steps(ours, how(here, ours), family)
        assert losses == pytest.approx(steps(theirs, how(peft.optimizers, theirs), family), rel=1e-7)
        same_tensors(tensors(ours), tensors(theirs), rtol=1e-6, atol=1e-8)
    moved = {key for key, tensor in tensors(ours).items() if not torch.equal(tensor, before[key])}
    assert moved == {key for key in before if name != "lorafa" or "lora_A" not in key}


def one(kind: str = "lora", **changes: Any) -> tuple[PeftModel, Lora]:
    """LoRA on one layer, s = 3, all tensors random and with gradients."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0"], **changes})
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5)).double(), config)
    ((_, adapter),) = adapters_of(model, "default")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    return model, adapter


def test_loraplus_by_hand() -> None:
    model, adapter = one(lora_bias=True)
    old = copy.deepcopy(adapter)
    here.create_loraplus_optimizer(model, SGD, lr=0.1, loraplus_lr_ratio=16, loraplus_weight_decay=0.5).step()
    torch.testing.assert_close(adapter.down, old.down - 0.1 * (adapter.down.grad + 0.5 * old.down))
    torch.testing.assert_close(adapter.up, old.up - 1.6 * (adapter.up.grad + 0.5 * old.up))
    torch.testing.assert_close(adapter.bias, old.bias - 1.6 * adapter.bias.grad)


def test_loraplus_on_variants_and_heads() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 3))
    model = get_peft_model(base, LoraConfig(use_dora=True, target_modules=["0", "2"], modules_to_save=["1", "3"]))
    optimizer = here.create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=4, loraplus_weight_decay=0.1)
    groups = [(g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in optimizer.param_groups]
    assert groups == [
        (1e-3, 0.1, [(8, 4), (3, 5)]),  # down, the head's weight
        (1e-6, 0.1, [(8, 7), (4, 8), (4,)]),  # the embedding's factors and lengths
        (4e-3, 0.1, [(5, 8), (5,)]),  # up and the lengths
        (4e-3, 0.0, [(4,), (4,), (3,)]),  # norm and biases
    ]


def test_lorafa_by_hand() -> None:
    model, adapter = one()
    old = copy.deepcopy(adapter)
    optimizer = here.create_lorafa_optimizer(model, lr=0.1, weight_decay=0.5, betas=(0.0, 0.0), eps=1.0)
    grad = adapter.up.grad @ torch.linalg.inv(adapter.down @ adapter.down.t()) / 9
    optimizer.step()
    assert torch.equal(adapter.down, old.down)
    assert not adapter.down.requires_grad
    expected = (old.up - 0.1 * grad / (grad.abs() + 1)) * (1 - 0.05)
    torch.testing.assert_close(adapter.up, expected.detach(), rtol=1e-6, atol=1e-8)


def test_lorafa_moves_the_weight_as_near_to_the_full_gradient_as_up_can() -> None:
    model, adapter = one()
    full = torch.randn(5, 4, dtype=torch.float64)
    adapter.up.grad = 3 * full @ adapter.down.detach().t()
    optimizer = here.create_lorafa_optimizer(model)
    move = 3 * optimizer._direction(adapter.up) @ adapter.down
    best = torch.linalg.lstsq(adapter.down.t(), full.t()).solution.t() @ adapter.down
    torch.testing.assert_close(move, best, rtol=1e-6, atol=1e-7)


def test_lorafa_keeps_no_input_for_the_frozen_factor() -> None:
    model, _ = one()
    here.create_lorafa_optimizer(model)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(torch.randn(7, 4, dtype=torch.float64))
    assert (7, 4) not in kept


def test_riemannian_by_hand() -> None:
    model, adapter = one()
    old = copy.deepcopy(adapter)
    grad_down, grad_up = adapter.down.grad.clone(), adapter.up.grad.clone()
    here.create_riemannian_optimizer(model, SGD, lr=0.1, reg=0.25).step()
    identity = 0.25 * torch.eye(2, dtype=torch.float64)
    down = old.down - 0.1 * torch.linalg.inv(old.up.t() @ old.up + identity) @ grad_down
    up = old.up - 0.1 * grad_up @ torch.linalg.inv(old.down @ old.down.t() + identity)
    torch.testing.assert_close(adapter.down, down)
    torch.testing.assert_close(adapter.up, up)


def test_a_riemannian_step_does_not_depend_on_the_split_of_the_product() -> None:
    products = []
    for factor in (1.0, 50.0):
        model, adapter = one()
        with torch.no_grad():
            adapter.down *= factor
            adapter.up /= factor
        optimizer = here.create_riemannian_optimizer(model, SGD, lr=0.1, reg=1e-12)
        optimizer.zero_grad()
        model(torch.eye(4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        products.append((adapter.up @ adapter.down).detach())
    # Equal up to the term of the second order, which has no split.
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "target", "shape"),
    [
        (nn.Conv2d(3, 4, 3), {"target_modules": ["0"]}, (4, 3, 5, 5)),
        (Experts(False), {"target_parameters": ["0.stack"]}, (3, 4, 8)),
    ],
    ids=["convolution", "stack"],
)
def test_other_kinds_of_places(layer: nn.Module, target: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)).double(), LoraConfig(r=2, **target))
    for create in (
        lambda: here.create_loraplus_optimizer(model, SGD, lr=0.1, loraplus_lr_ratio=2),
        lambda: here.create_riemannian_optimizer(model, SGD, lr=0.1),
        lambda: here.create_lorafa_optimizer(model, lr=0.1),
    ):
        ((_, adapter),) = adapters_of(model, "default")
        old = adapter.up.detach().clone()
        optimizer = create()
        model(torch.randn(shape, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(adapter.up, old)


@pytest.mark.parametrize(
    "create",
    [
        lambda model: here.create_loraplus_optimizer(model, SGD, lr=0.1, loraplus_lr_ratio=2),
        lambda model: here.create_lorafa_optimizer(model),
        lambda model: here.create_riemannian_optimizer(model, SGD, lr=0.1),
    ],
    ids=["loraplus", "lorafa", "riemannian"],
)
def test_other_methods_are_refused(create: Make) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5)), "bitfit:target_modules=['0']")
    with pytest.raises(UnsupportedError, match="the model has no LoRA adapter that is trained"):
        create(model)


def test_what_does_not_fit_is_refused() -> None:
    model, _ = one(kasa_config={}, r=1)
    for create in (here.create_lorafa_optimizer, lambda m: here.create_riemannian_optimizer(m, SGD, lr=0.1)):
        with pytest.raises(UnsupportedError, match="those of Kasa adapters are a part of it"):
            create(model)
    model, _ = one()
    with pytest.raises(ConfigError, match="r=8, but adapter 'default' has 2"):
        here.create_lorafa_optimizer(model, 8, 6, 1e-3)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio=0"):
        here.create_loraplus_optimizer(model, SGD, lr=0.1, loraplus_lr_ratio=0)
    with pytest.raises(ConfigError, match="reg=0"):
        here.create_riemannian_optimizer(model, SGD, lr=0.1, reg=0)
    with pytest.raises(UnsupportedError, match="LBFGS computes gradients within a step"):
        here.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)
    with pytest.raises(UnsupportedError, match="computed anew"):
        here.create_riemannian_optimizer(model, SGD, lr=0.1).step(lambda: 0.0)
    with pytest.raises(ConfigError, match="betas in"):
        here.create_lorafa_optimizer(model, lr=-1.0)
