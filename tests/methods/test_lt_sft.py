"""LT-SFT: both phases by hand, and what the second starts from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tiny import llama, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, StateError
from veneer.methods.lt_sft import LtSftConfig

SETTINGS = [{"density": 0.3, "steps": 2}]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(5, 4).double()
        self.b = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


BATCHES = [torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(2)]


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_entries_that_full_fine_tuning_moves_most(scope: str) -> None:
    plain = Two()
    start = copy.deepcopy(plain)
    optimiser = torch.optim.AdamW([plain.a.weight, plain.b.weight], lr=1e-2, weight_decay=0.0)
    for step in range(5):
        optimiser.zero_grad()
        loss(plain, BATCHES[step % 2]).backward()
        optimiser.step()
    moved = {name: (getattr(plain, name).weight - getattr(start, name).weight).abs().flatten() for name in "ab"}

    config = LtSftConfig(target_modules=["a", "b"], scope=scope, density=0.25, steps=5, learning_rate=1e-2)  # type: ignore[arg-type]
    model = get_peft_model(Two(), config).train()
    with pytest.raises(StateError, match=r"veneer\.prepare"):
        model(BATCHES[0])
    veneer.prepare(model, BATCHES, loss=loss)
    assert torch.equal(model(BATCHES[0]), start(BATCHES[0]))  # reset
    found = {wrapper.path: adapter for wrapper, adapter in adapters_of(model, "default")}
    if scope == "layer":
        for name in "ab":
            count = int(0.25 * moved[name].numel())
            assert found[name].indices.tolist() == sorted(moved[name].topk(count).indices.tolist())
    else:
        best = torch.cat([moved["a"], moved["b"]]).topk(8).indices.sort().values
        chosen = [found["a"].indices.long(), found["b"].indices.long() + 20]
        assert torch.equal(torch.cat(chosen), best)
    assert model.get_nb_trainable_parameters()[0] == (5 + 3 if scope == "layer" else 8)
    assert all(adapter.values.dtype == torch.float64 for adapter in found.values())


def test_phase_two_trains_only_these(tmp_path: Any) -> None:
    batch = {"input_ids": tokens(), "labels": tokens()}
    model = get_peft_model(llama(), LtSftConfig(density=0.02, steps=2)).train()
    veneer.prepare(model, [batch])
    assert model.training
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        value = model(**batch).loss
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    base, merged = llama().state_dict(), model.merge_and_unload().state_dict()
    changed = sum(int((merged[key] != base[key]).sum()) for key in base)
    assert 0 < changed <= int(0.02 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3))


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="steps=0"):
        LtSftConfig(steps=0)
    with pytest.raises(ConfigError, match="criterion='snip'"):
        LtSftConfig(criterion="snip")  # type: ignore[arg-type]
