"""Diff pruning: gates, loss term and pruning by hand, and what is saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tiny import llama, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.diff_pruning import DiffPruning, DiffPruningConfig

# Noise in training would differ between two calls; without it forward and definition are compared.
SETTINGS = [{"noise": False, "init_gate": 0.6}, {"noise": False, "structured": True, "init_gate": 0.6}]


def adapted(**settings: Any) -> tuple[veneer.PeftModel, DiffPruning]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    model = get_peft_model(nn.Sequential(layer), DiffPruningConfig(target_modules=["0"], **settings))
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, DiffPruning)
    return model, adapter


def fill(adapter: DiffPruning, delta: list[list[float]], gates: list[list[float]]) -> None:
    adapter.put("delta", torch.tensor(delta, dtype=torch.float64))
    adapter.put("gates", torch.tensor(gates, dtype=torch.float64) - adapter.config.init_gate)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_gates_are_stretched_and_cut() -> None:
    _, adapter = adapted(structured=True)
    fill(adapter, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[9.0, 0.0, -9.0], [0.5, -0.1, 1.0]])
    adapter.put("group", torch.tensor([0.7 - 5.0]))
    weight = adapter.site.read()
    group = 3 * sigmoid(0.7) - 1.5
    z = [1.0, 0.0, 0.0, 3 * sigmoid(0.5) - 1.5, 0.0, 3 * sigmoid(1.0) - 1.5]
    expected = [group * gate * delta for gate, delta in zip(z, range(1, 7), strict=True)]
    torch.testing.assert_close((adapter.adapt(weight) - weight).flatten().tolist(), expected, rtol=1e-6, atol=1e-9)


def test_noise_is_that_of_the_hard_concrete_distribution() -> None:
    model, adapter = adapted()
    fill(adapter, [[1.0] * 3] * 2, [[0.4] * 3] * 2)
    weight = adapter.site.read()
    torch.manual_seed(3)
    y = model.train()(torch.eye(3, dtype=torch.float64))
    torch.manual_seed(3)
    u = torch.rand(2, 3, dtype=torch.float64)
    z = (3 * torch.sigmoid(0.4 + u.log() - (1 - u).log()) - 1.5).clamp(0, 1)
    torch.testing.assert_close(y.t(), weight + z)
    # In evaluation it is left out.
    torch.testing.assert_close(model.eval()(torch.eye(3).double()).t(), weight + 3 * sigmoid(0.4) - 1.5)


@pytest.mark.parametrize("structured", [False, True])
def test_the_loss_term_is_the_expected_number_of_open_gates(structured: bool) -> None:
    _, adapter = adapted(structured=structured)
    config = DiffPruningConfig(sparsity_weight=0.25)
    fill(adapter, [[0.0] * 3] * 2, [[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    expected = 0.25 * (3 * 0.5 + sigmoid(1) + sigmoid(-1) + sigmoid(2))
    if structured:
        adapter.put("group", torch.tensor([0.7 - 5.0]))
        expected *= sigmoid(0.7)
    found = DiffPruning.penalty([adapter], config)
    assert found is not None
    assert found.item() == pytest.approx(expected, rel=1e-6)
    # P(z > 0), by drawing.
    torch.manual_seed(0)
    u = torch.rand(100_000)
    assert (3 * torch.sigmoid(1.0 + torch.logit(u)) - 1.5 > 0).float().mean().item() == pytest.approx(
        sigmoid(1), abs=0.01
    )


def test_the_largest_changes_are_left_and_trained_on() -> None:
    config = {"density": 0.5, "relaxed": 0.5, "total_steps": 4}
    model, adapter = adapted(**config)
    fill(adapter, [[1.0, -9.0, 3.0], [-4.0, 5.0, 0.1]], [[9.0, -9.0, 9.0], [9.0, 9.0, 9.0]])
    model.update_and_allocate(0)
    assert adapter.mask.numel() == 0
    model.update_and_allocate(1)
    expected = torch.tensor([[0.0, 0.0, 3.0], [-4.0, 5.0, 0.0]]).double()
    weight = adapter.site.read()
    torch.testing.assert_close(adapter.adapt(weight) - weight, expected)
    assert DiffPruning.penalty([adapter], DiffPruningConfig()) is None
    model.train()(torch.randn(2, 3).double()).sum().backward()
    assert adapter.delta is not None
    assert adapter.delta.grad is not None
    assert ((adapter.delta.grad != 0) == (expected != 0)).all()
    state = veneer.get_peft_model_state_dict(model)
    assert state["base_model.model.0.sparse_indices"].tolist() == [2, 3, 4]
    assert state["base_model.model.0.sparse_values"].tolist() == [3.0, -4.0, 5.0]


def start(**settings: Any) -> tuple[veneer.PeftModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = get_peft_model(llama(), DiffPruningConfig(density=0.02, total_steps=8, relaxed=0.5, **settings)).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def run(model: veneer.PeftModel, optimiser: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        optimiser.zero_grad()
        loss: Tensor = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimiser.step()
        model.update_and_allocate(step, optimiser)
        losses.append(loss.item())
    return losses


def test_a_trained_adapter_is_small_and_loads(tmp_path: Any) -> None:
    model, optimiser = start()
    losses = run(model, optimiser, range(8))
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    entries = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    assert loaded.get_nb_trainable_parameters()[0] == int(0.02 * entries)
    loaded.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad and p.numel())


@pytest.mark.parametrize("at", [2, 6])
def test_a_resumed_run_is_the_same(at: int, tmp_path: Any) -> None:
    whole, optimiser = start(structured=True)
    run(whole, optimiser, range(at))
    whole.save_pretrained(tmp_path)
    kept = {key: tensor.detach().clone() for key, tensor in whole.kept_schedules()["default"].items()}
    state = {"state": {k: {n: t.clone() for n, t in s.items()} for k, s in optimiser.state_dict()["state"].items()}}
    again, second = start(structured=True)
    again.resume_schedule("default", kept)
    veneer.set_peft_model_state_dict(again, veneer.load_peft_weights(tmp_path))
    second.load_state_dict({**optimiser.state_dict(), **state})
    assert run(again, second, range(at, 8)) == run(whole, optimiser, range(at, 8))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"density": 2.0}, "density=2.0; a share"),
        ({"relaxed": 0.0}, "relaxed=0.0; a positive"),
        ({"sparsity_weight": -1.0}, "sparsity_weight=-1.0; a positive"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DiffPruningConfig(**settings)


def test_a_loop_of_ones_own_names_its_steps() -> None:
    model, _ = adapted()
    with pytest.raises(ConfigError, match="total_steps is None"):
        model.update_and_allocate(0)
