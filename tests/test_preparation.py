"""Letting a method see data: what it is shown, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

import tiny
import veneer
from veneer.adapter import WeightAdapter
from veneer.config import ModuleConfig
from veneer.errors import StateError
from veneer.preparation import Run, awaits_data
from veneer.sites import Site


class Steepest(WeightAdapter):
    """Trains one row of the weight, the one with the largest gradient; what it saw is kept for the tests."""

    kinds = frozenset({"linear", "embedding", "parameter"})
    task = "gradients"
    each_example = False
    seen: dict[str, list[Tensor]]
    runs = 0

    def __init__(self, site: Site, config: SteepestConfig) -> None:
        super().__init__(site, config)
        self.row = nn.Parameter(torch.zeros(site.shape[1]))
        self.register_buffer("index", torch.zeros((), dtype=torch.long))

    @classmethod
    def needs_data(cls, config: SteepestConfig) -> bool:
        return config.by_data

    @classmethod
    def prepare(cls, adapters: Mapping[str, Self], config: SteepestConfig, run: Run) -> SteepestConfig:
        cls.seen = {path: [] for path in adapters}
        if cls.task == "gradients":
            cls.runs = run.gradients(lambda p, g: cls.seen[p].append(g), each_example=cls.each_example)
            for path, adapter in adapters.items():
                adapter.index.copy_(sum(cls.seen[path]).abs().sum(-1).argmax())
        else:
            cls.runs = run.inputs(lambda p, x: cls.seen[p].append(x))
        config.noted = cls.runs
        return config

    def adapt(self, weight: Tensor) -> Tensor:
        return weight.index_add(0, self.index[None], self.row[None])


@dataclass
class SteepestConfig(ModuleConfig):
    adapter = Steepest
    peft_name = "STEEPEST"

    by_data: bool = True
    noted: int = 0


def adapted(model: nn.Module, targets: Any, **how: Any) -> veneer.PeftModel:
    return veneer.get_peft_model(model, SteepestConfig(target_modules=targets, **how))


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    made = []
    for seed in range(2):
        ids = tiny.tokens(3, 7, seed=seed)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return made


def dense_gradients(model: nn.Module, path: str, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    weight = model.get_submodule(path).weight
    found = []
    for batch in batches:
        (gradient,) = torch.autograd.grad(model.eval()(**batch).loss, [weight])
        found.append(gradient)
    return found


@pytest.fixture(autouse=True)
def _gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steepest, "task", "gradients")
    monkeypatch.setattr(Steepest, "each_example", False)


def test_gradients_are_those_of_the_dense_weights(batches: list[dict[str, Tensor]]) -> None:
    base = tiny.llama().double()
    targets = ["q_proj", "down_proj", "embed_tokens"]
    model = adapted(tiny.llama().double(), targets)
    asking = [p.requires_grad for p in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    veneer.prepare(model, iter(batches))
    assert Steepest.runs == 2
    for path, seen in Steepest.seen.items():
        expected = dense_gradients(base, path, batches)
        for a, b in zip(seen, expected, strict=True):
            torch.testing.assert_close(a, b.t() if "embed" in path else b, rtol=1e-9, atol=1e-12)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if not key.endswith("index"))
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == asking
    assert all(p.grad is None for p in model.parameters())
    assert model.active_adapters == ["default"]
    assert model.peft_config["default"].noted == 2


def test_gradients_of_single_examples(batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steepest, "each_example", True)
    base = tiny.llama().double()
    veneer.prepare(adapted(tiny.llama().double(), ["v_proj"]), batches)
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(3)]
    assert Steepest.runs == 6
    for path, seen in Steepest.seen.items():
        for a, b in zip(seen, dense_gradients(base, path, rows), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_no_more_than_one_gradient_is_held(batches: list[dict[str, Tensor]]) -> None:
    model = adapted(tiny.llama(), "all-linear")
    places = {w.place: w for w, _ in veneer.adapted.adapters_of(model.get_base_model(), "default")}
    held: list[int] = []

    def see(path: str, gradient: Tensor) -> None:
        leaves = [wrapper.adapters["_probe"].weight for wrapper in places.values()]
        held.append(sum(leaf is not None and leaf.grad is not None for leaf in leaves))

    Run(model, places, batches).gradients(see)
    assert held == [0] * (2 * len(places))


def test_inputs_are_those_of_the_layers_without_adapters(
    batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Steepest, "task", "inputs")
    base = tiny.llama().double().eval()
    caught: dict[str, list[Tensor]] = {}
    for path, module in base.named_modules():
        if path.endswith(("q_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, args, path=path: caught.setdefault(path, []).append(args[0]))
    for batch in batches:
        base(**batch)
    model = adapted(tiny.llama().double(), ["q_proj", "down_proj"])
    tiny.randomise(model)
    veneer.prepare(model, batches)
    assert Steepest.seen.keys() == caught.keys()
    for path, seen in Steepest.seen.items():
        assert not any(x.requires_grad for x in seen)
        for a, b in zip(seen, caught[path], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_run_can_end_early(batches: list[dict[str, Tensor]]) -> None:
    model = adapted(tiny.llama(), ["q_proj"])
    run = Run(model, {}, batches)
    assert run.forward(until=lambda: True) == 1
    assert run.batch is None


def test_training_before_preparing_is_refused(batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = adapted(tiny.llama(), ["q_proj"])
    assert awaits_data(model)
    with pytest.raises(StateError, match=r"Steepest adapter has to see data.*veneer\.prepare"):
        model(**batches[0])
    model.eval()(**batches[0])
    with pytest.raises(StateError, match="no batch"):
        veneer.prepare(model, [])
    assert awaits_data(model)
    veneer.prepare(model, batches)
    assert not awaits_data(model)
    model.train()(**batches[0]).loss.backward()
    loaded = veneer.get_peft_model(tiny.llama(), SteepestConfig(target_modules=["q_proj"]))
    veneer.set_peft_model_state_dict(loaded, veneer.get_peft_model_state_dict(model))
    assert not awaits_data(loaded)


def test_what_needs_no_data_sees_none() -> None:
    model = adapted(tiny.llama(), ["q_proj"], by_data=False)
    assert not awaits_data(model)
    veneer.prepare(model, [])


def test_a_loss_of_ones_own_and_other_batches() -> None:
    layer = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    model = adapted(layer, ["0"])
    with pytest.raises(StateError, match="gives no loss"):
        veneer.prepare(model, [x])
    veneer.prepare(model, [x], loss=lambda m, batch: m(batch).square().sum())
    weight = model.unload()[0].weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), [weight])
    torch.testing.assert_close(Steepest.seen["0"][0], expected)
    with pytest.raises(StateError, match="depends on no adapted weight"):
        veneer.prepare(adapted(layer, ["0"]), [x], loss=lambda m, batch: m(batch).detach().sum())
