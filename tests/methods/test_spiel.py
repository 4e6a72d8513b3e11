"""SpIEL: what is dropped, what grows, when, and that the optimiser goes along."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from tiny import llama, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.spiel import Spiel, SpielConfig

SETTINGS = [{"density": 0.3}]


def adapted(**settings: Any) -> tuple[veneer.PeftModel, Spiel]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 2, bias=False).double()
    model = get_peft_model(nn.Sequential(layer), SpielConfig(target_modules=["0"], **settings)).train()
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, Spiel)
    return model, adapter


def place(adapter: Spiel, indices: list[int], values: list[float]) -> None:
    tensors = {"sparse_indices": torch.tensor(indices), "sparse_values": torch.tensor(values, dtype=torch.float64)}
    adapter.from_file(tensors)


def test_the_smallest_values_give_way_to_the_largest_gradients() -> None:
    _, adapter = adapted(density=0.5)
    place(adapter, [6, 1, 3, 0], [0.5, -0.1, 2.0, 0.2])
    adapter.see(torch.tensor([[9.0, 0.0, 3.0, 0.0], [-4.0, 1.0, 0.0, 0.0]]))
    assert adapter.candidates is not None
    assert sorted(adapter.candidates.tolist()) == [0, 2, 4, 5]
    adapter.see(torch.tensor([[0.0, 99.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))  # entry 1 is no candidate any more
    renewed = adapter.move(0.5, steps=2)
    # Entries 1 and 0 are smallest. Of the candidates 0 (9), 2 (5), 4 (4), 5 (2) the best two are 0, which stays, and 2.
    assert adapter.indices.tolist() == [6, 2, 3, 0]
    assert adapter.values.tolist() == [0.5, 0.0, 2.0, 0.2]
    assert (renewed.where.tolist(), renewed.gradient.tolist()) == ([1], [2.5])
    assert not adapter.watching


def test_when_it_moves_and_how_much() -> None:
    _, adapter = adapted(density=0.5, interval=10, accumulation=2, total_steps=40, replaced=0.5)
    shares: list[tuple[int, float]] = []
    watched: list[int] = []
    adapter.move = lambda share, steps: shares.append((step, share)) or setattr(adapter, "watching", False)  # type: ignore[assignment, method-assign, func-returns-value]
    config = SpielConfig(density=0.5, interval=10, accumulation=2, total_steps=40, replaced=0.5)
    for step in range(40):
        Spiel.allocate({"0": adapter}, config, step)
        if adapter.watching:
            watched.append(step)
    assert [step for step, _ in shares] == [2, 12, 22, 32]
    assert [share for _, share in shares] == pytest.approx([1.0, 0.5 * 0.7, 0.5 * 0.45, 0.5 * 0.2])
    assert watched == [0, 1, 10, 11, 20, 21, 30, 31]


def test_gradients_are_seen_while_it_watches_and_at_no_other_time() -> None:
    model, adapter = adapted(density=0.5)
    x = torch.randn(3, 4).double()
    expected = torch.zeros(2, 4).double() + x.sum(0)  # of the sum of all outputs
    model(x).sum().backward()
    assert adapter.candidates is None
    adapter.watching = True
    y = model(x)
    torch.testing.assert_close(y, x @ adapter.adapt(adapter.site.read()).t())
    y.sum().backward()
    assert adapter.candidates is not None
    assert adapter.sums is not None
    best = expected.flatten().abs().topk(4).values
    torch.testing.assert_close(adapter.sums.abs().sort().values, best.float().sort().values)


def test_the_optimiser_begins_with_the_gradient_of_what_has_grown() -> None:
    model, adapter = adapted(density=0.5, interval=4, accumulation=1, total_steps=8)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    x = torch.randn(3, 4).double()
    for step in range(2):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
        before, sums, candidates = adapter.indices.clone(), adapter.sums, adapter.candidates
        model.update_and_allocate(step, optimiser)
    assert sums is not None
    assert candidates is not None
    gradient = dict(zip(candidates.tolist(), sums.tolist(), strict=True))
    state = optimiser.state[adapter.values]
    changed = (before != adapter.indices).nonzero().flatten().tolist()
    assert changed
    for slot in changed:
        known = gradient[int(adapter.indices[slot])]
        assert state["exp_avg"][slot].item() == pytest.approx(known)
        assert state["exp_avg_sq"][slot].item() == pytest.approx(known**2)


def test_it_learns_and_a_resumed_run_is_the_same(tmp_path: Any) -> None:
    def start() -> tuple[veneer.PeftModel, torch.optim.Optimizer]:
        torch.manual_seed(0)
        config = SpielConfig(density=0.05, interval=6, accumulation=2, total_steps=20)
        model = get_peft_model(llama(), config).train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def run(model: veneer.PeftModel, optimiser: torch.optim.Optimizer, steps: range) -> float:
        for step in steps:
            optimiser.zero_grad()
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimiser.step()
            model.update_and_allocate(step, optimiser)
        return loss.item()

    whole, optimiser = start()
    first = run(whole, optimiser, range(1))
    run(whole, optimiser, range(1, 14))  # in the middle of a watch
    assert any(adapter.watching for _, adapter in adapters_of(whole, "default"))
    whole.save_pretrained(tmp_path)
    kept, state = whole.kept_schedules()["default"], optimiser.state_dict()
    again, second = start()
    again.resume_schedule("default", kept)
    veneer.set_peft_model_state_dict(again, veneer.load_peft_weights(tmp_path))
    second.load_state_dict(copy.deepcopy(state))
    last = run(whole, optimiser, range(14, 20))
    assert run(again, second, range(14, 20)) == last
    assert last < first
    ours, theirs = (veneer.get_peft_model_state_dict(model) for model in (whole, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"density": 2.0}, "density=2.0; a share"),
        ({"accumulation": 5, "interval": 5}, "fewer steps"),
        ({"replaced": 0.0}, "replaced=0.0; a positive"),
        ({"density": 0.01}, "leaves no entry"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        adapted(**settings)


def test_a_loop_of_ones_own_names_its_steps() -> None:
    model, _ = adapted(density=0.5)
    with pytest.raises(ConfigError, match="total_steps is None"):
        model.update_and_allocate(0)
