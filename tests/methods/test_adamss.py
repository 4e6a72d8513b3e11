"""AdaMSS against peft, and its schedule."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

import veneer
from parity.families import FAMILIES
from parity.oracle import OLD_NAME, output
from parity.test_training import loss_of
from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, VeneerWarning
from veneer.methods.adamss import Adamss, AdamssConfig, clusters

SETTINGS: list[dict[str, Any]] = [
    {"r": 4, "num_subspaces": 2, "subspace_rank": 2},
    {"r": 3, "num_subspaces": 3, "subspace_rank": 3, "use_dynamic_rank": True, "init_weights": None},
]
ASA: dict[str, Any] = {
    "use_asa": True, "asa_target_subspaces": 9, "init_warmup": 1, "final_warmup": 7, "mask_interval": 2,
}  # fmt: skip
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 8, "num_subspaces": 3, "subspace_rank": 2}),
    ("bert", {"r": 6}),  # of all 32 directions the rows would be equally far apart, and groups a matter of rounding
    ("t5", {"r": 8, "num_subspaces": 4, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": 0.3}),
    ("perceptron", {"r": 4, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["lin0", "lin1"]}),
]


@pytest.fixture(autouse=True)
def _peft_may_talk() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OLD_NAME)
        warnings.filterwarnings("ignore", module=r"peft\..*")
        yield


def twins(family: str, changes: dict[str, Any]) -> tuple[veneer.PeftModel, peft.PeftModel]:
    from parity.test_methods import twins  # which reads `PARITY` from here

    return twins("adamss", FAMILIES[family], changes)


def adapters(model: nn.Module) -> list[Adamss]:
    return [adapter for _, adapter in adapters_of(model, "default") if isinstance(adapter, Adamss)]


def test_the_formula_by_hand() -> None:
    layer = nn.Linear(2, 3).double()
    model = get_peft_model(nn.Sequential(layer), "adamss:r=2,num_subspaces=2,target_modules=['0']")
    (adapter,) = adapters(model)
    adapter.resize([(2, 1), (1, 1)])  # rows 2 and 0, then row 1
    with torch.no_grad():
        adapter.order.copy_(torch.tensor([1, 2, 0]))
        adapter.basis.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]))
        for tensor, values in zip(
            [*adapter.down, *adapter.up], [[[1.0, 2.0]], [[3.0, 0.0]], [[10.0], [1.0]], [[5.0]]], strict=True
        ):
            tensor.copy_(torch.tensor(values))
    # down basis = [1, 2 | 4] and [3, 0 | 6], which rows 2, 0 and 1 have 10, 1 and 5 times.
    weight = layer.weight + torch.tensor([[1.0, 2.0], [15.0, 0.0], [10.0, 20.0]])
    bias = layer.bias + torch.tensor([4.0, 30.0, 40.0])
    x = torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ weight.t() + bias, rtol=1e-12, atol=1e-12)


def test_the_start_lies_in_the_weight() -> None:
    model = get_peft_model(llama(), "adamss:r=6,num_subspaces=3,subspace_rank=2,target_modules=[q_proj]")
    for adapter in adapters(model):
        assert sum(p.numel() for p in adapter.parameters()) == 2 * (3 * 6 + 32)
        for down in adapter.down:
            torch.testing.assert_close(down @ down.t(), torch.eye(2), rtol=1e-4, atol=1e-5)
        kept = adapter.basis.t() @ adapter.basis
        weight = adapter.site.read()
        assert (weight @ kept).norm() > 0.4 * weight.norm()
        assert sorted(adapter.order.tolist()) == list(range(32))


@pytest.mark.parametrize("count", [3, 40, 700])
def test_groups_are_those_of_scikit_learn(count: int) -> None:
    points = torch.randn(count, 8, generator=torch.Generator().manual_seed(count))
    for number in (1, 5):
        fitted = KMeans(min(number, count), init="random", n_init=1, max_iter=10, random_state=123456789)
        labels = torch.from_numpy(fitted.fit_predict(points.numpy()))
        expected = [(labels == i).nonzero().flatten() for i in range(min(number, count))]
        for one, other in zip(clusters(points, number), expected, strict=True):
            assert torch.equal(one, other)


def test_equal_rows_make_fewer_groups() -> None:
    groups = clusters(torch.ones(6, 2), 3)
    assert [len(rows) for rows in groups] == [6]


def test_basis_and_groups_are_those_of_peft() -> None:  # whose directions within a group are approximate
    kind = FAMILIES["llama"]
    values = {"r": 8, "num_subspaces": 3, "subspace_rank": 2, "target_modules": kind.targets}
    here = get_peft_model(kind.model(), AdamssConfig(**values))
    there = peft.get_peft_model(kind.model(), peft.AdamssConfig(**values))
    modules = [module for module in there.modules() if hasattr(module, "adamss_newB")]
    for adapter, module in zip(adapters(here), modules, strict=True):
        torch.testing.assert_close(adapter.basis, module.adamss_newB["default"])
        assert torch.equal(adapter.order, module.scatter_index["default"].argsort())
        assert [len(down) for down in adapter.down] == [len(down) for down in module.adamss_A["default"]]


def test_groups_are_read_from_files_and_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = FAMILIES["llama"]
    model = get_peft_model(
        kind.model(), AdamssConfig(r=8, num_subspaces=3, target_modules=kind.targets, init_weights=None)
    )
    for adapter in adapters(model):
        adapter.order.copy_(adapter.order.flip(0))
    model.eval().save_pretrained(tmp_path)
    monkeypatch.delattr(Adamss, "split")
    loaded = veneer.PeftModel.from_pretrained(kind.model(), tmp_path)
    assert torch.equal(output(loaded, kind.inputs()), output(model, kind.inputs()))


def test_the_schedule_beside_that_of_peft() -> None:
    kind = FAMILIES["llama"]
    changes = {"r": 8, "num_subspaces": 3, **ASA, "target_modules": kind.targets}
    here, there = twins("llama", changes)
    optimizers = []
    for model in (here, there):
        model.train()
        optimizers.append(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    modules = [module for module in there.modules() if hasattr(module, "adamss_newB")]
    config = here.peft_config["default"]
    for step in range(3):
        for model, optimizer in zip((here, there), optimizers, strict=True):
            loss_of(model, kind, step).backward()
            optimizer.step()
        here.update_and_allocate(step)
        there.base_model.update_and_allocate(step)
        theirs = [p.requires_grad for module in modules for p in module.adamss_A["default"]]
        ours = [on for adapter in adapters(here) for on in adapter.trained]
        assert step == 2 or (all(ours) and all(theirs))
        for optimizer in optimizers:
            optimizer.zero_grad()
    for step in range(1, 8):
        wanted = there.base_model._schedule_threshold(step, there.peft_config["default"])
        assert config.budget(step, 3 * 6) == wanted
    # After the first choice the two differ: peft lets one more rest than its schedule says, the least of those kept.
    assert sum(ours) == config.budget(2, 18) == sum(theirs) + 1
    assert all(one or not other for one, other in zip(ours, theirs, strict=True))


def test_groups_that_rest_stay_as_they_are() -> None:
    kind = FAMILIES["llama"]
    settings = {"r": 8, "num_subspaces": 3, **ASA, "target_modules": kind.targets}
    model = get_peft_model(kind.model(), AdamssConfig(**settings)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    counts = []
    for step in range(12):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        resting = {
            id(p)
            for adapter in adapters(model)
            for factors in (adapter.down, adapter.up)
            for p, on in zip(factors, adapter.trained, strict=True)
            if not on
        }
        loss_of(model, kind, step).backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            if p.requires_grad and step > 0:
                assert torch.equal(p, before[name]) == (id(p) in resting), name
        counts.append(sum(sum(adapter.trained) for adapter in adapters(model)))
    expected = [18 if step < 2 else int(9 + 9 * (1 - (min(step - step % 2, 7) - 1) / 6) ** 3) for step in range(12)]
    expected[7:] = [9] * 5
    assert counts == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"use_asa": True, "init_warmup": 5, "final_warmup": 5}, "leave no step for the schedule"),
        ({"use_asa": True, "mask_interval": 0}, "mask_interval=0"),
        ({"init_weights": "kaiming"}, "init_weights='kaiming'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamssConfig(**settings)


def test_a_training_that_ends_before_the_schedule_is_said() -> None:
    with pytest.warns(VeneerWarning, match="the training has 100 steps and the schedule ends at final_warmup=1000"):
        AdamssConfig(use_asa=True).begin(100)
