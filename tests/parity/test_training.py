"""The same ten optimiser steps here and in peft end in the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.families import FAMILIES, ROWS, Family
from parity.oracle import BIASES, CONV1D, TIED, peft_says, same_tensors, settings, tensors, twins

STEPS = 10
PADDING = {"perceptron": 0, "bart": 1}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"lora_bias": True, "use_rslora": True, "modules_to_save": ["lm_head"]}),
    ("gpt2", {}),
    ("bert", {}),
    ("t5", {}),
    ("bart", {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}),
    ("vit", {}),
    ("resnet", {}),
    ("perceptron", {}),
    ("convolutions", {}),
    ("mixtral", {}),
]


def loss_of(model: nn.Module, family: Family, step: int) -> Tensor:
    """The model's own loss, on rows in another order at every step; squared outputs for plain modules."""
    order = torch.arange(ROWS).roll(step)
    batch = {name: x[order] for name, x in family.inputs().items()}
    if family.labels is None:
        return F.mse_loss(model(**batch), torch.linspace(-1, 1, 4 * ROWS, dtype=torch.float64).view(ROWS, 4)[order])
    return model(**batch, labels=family.labels()[order.roll(step // ROWS)]).loss


def train(model: nn.Module, family: Family, weight_decay: float = 0.1) -> list[float]:
    model.train()
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=weight_decay)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, family, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_ten_steps(name: str, changes: dict[str, Any]) -> None:
    family = FAMILIES[name]
    with peft_says(CONV1D, BIASES, TIED):
        here, there = twins(family, settings(family, **changes))
        # The row of a padding token is zero, as it is from the start on: it is never trained.
        for model in (here, there):
            for key, tensor in tensors(model).items():
                if "lora_embedding_A" in key:
                    tensor[:, PADDING[name]] = 0
        before = {key: tensor.clone() for key, tensor in tensors(here).items()}
        assert train(here, family) == pytest.approx(train(there, family), rel=1e-9)
        same_tensors(tensors(here), tensors(there), rtol=1e-7, atol=1e-9)
    moved = {key for key, tensor in tensors(here).items() if (tensor - before[key]).abs().max() > 1e-3}
    assert moved == set(before)
