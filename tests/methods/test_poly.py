"""Poly against the papers' formula and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from contract.evaluating import hold
from contract.places import SPOTS, Spot
from parity.families import FAMILIES
from parity.oracle import TIGHT, output, peft_says, same_tensors, take, tensors, trained
from parity.test_training import train
from tiny import llama, randomise, tokens
from veneer import PeftModel, get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.methods.poly import Poly, PolyConfig

SETTINGS: list[dict[str, Any]] = []  # random in training: see `test_promises_outside_of_training`
HERE = {"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "task": 1}
TASKS = torch.tensor([2, 0, 2])


@pytest.mark.parametrize("spot", [s for s in SPOTS if s.kind in Poly.kinds], ids=lambda spot: spot.name)
def test_promises_outside_of_training(spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    further = (
        "test_fast_forward_is_the_definition",
        "test_stacking_is_composition",
        "test_a_mixed_batch_is_each_row_alone",
    )
    hold("poly", HERE, spot, tmp_path, monkeypatch, further)


@pytest.mark.parametrize("spot", [s for s in SPOTS if s.kind in Poly.kinds], ids=lambda spot: spot.name)
def test_promises_in_training(spot: Spot) -> None:
    from contract import test_contract

    test_contract.test_it_starts_as_the_base_layer("poly", HERE, spot)
    test_contract.test_only_adapters_are_trained("poly", {"r": 3, "n_splits": 2}, spot)


@pytest.mark.parametrize("splits", [1, 2])
def test_every_row_has_the_weight_of_its_task(splits: int) -> None:
    config = PolyConfig(r=2, n_tasks=3, n_skills=2, n_splits=splits, target_modules=["v_proj"])
    model = get_peft_model(llama().double(), config).eval()
    randomise(model)
    (_, adapter), _ = adapters_of(model, "default")
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    expected = []
    for row, task in zip(x, TASKS.tolist(), strict=True):
        z = torch.sigmoid(adapter.router[task]).view(splits, 2)
        p = z / z.sum(1, keepdim=True)
        a = torch.cat([sum(p[q, s] * adapter.A[q, s] for s in range(2)) for q in range(splits)], 0)  # (in, r)
        b = torch.cat([sum(p[q, s] * adapter.B[q, s] for s in range(2)) for q in range(splits)], 1)  # (r, out)
        expected.append(row @ (adapter.site.read() + (a @ b).T / 2).T)
    model.switch.inputs = {"task_ids": TASKS}
    found = model.get_base_model().model.layers[0].self_attn.v_proj(x)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def twins(family: str) -> tuple[PeftModel, peft.PeftModel]:
    kind = FAMILIES[family]
    values = {"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "target_modules": kind.targets, **kind.settings}
    here = get_peft_model(kind.model(), PolyConfig(**values))
    randomise(here)
    with peft_says():
        there = peft.get_peft_model(kind.model(), peft.PolyConfig(**values)).eval()
    take(there, here)
    return here.eval(), there


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_it_is_that_of_peft(family: str, tmp_path: Path) -> None:
    here, there = twins(family)
    same_tensors(tensors(here), tensors(there))
    assert trained(here) == trained(there)
    x = {**FAMILIES[family].inputs(), "task_ids": TASKS}
    torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
    here.save_pretrained(tmp_path / "ours")
    there.save_pretrained(str(tmp_path / "theirs"))
    with peft_says():
        loaded = peft.PeftModel.from_pretrained(FAMILIES[family].model(), str(tmp_path / "ours"))
    torch.testing.assert_close(output(loaded, x), output(here, x), **TIGHT)
    again = PeftModel.from_pretrained(FAMILIES[family].model(), tmp_path / "theirs")
    torch.testing.assert_close(output(again, x), output(here, x), **TIGHT)


def test_ten_steps_are_those_of_peft() -> None:
    kind = FAMILIES["bert"]
    here, there = twins("bert")
    with_tasks = type(kind)(
        **{**vars(kind), "batch": lambda: {**kind.batch(), "task_ids": TASKS}}  # both draw the same numbers
    )
    losses = []
    for model in (here, there):
        torch.manual_seed(3)
        losses.append(train(model, with_tasks))
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)
    same_tensors(tensors(here), tensors(there), rtol=1e-6, atol=1e-8)


def test_tasks_generate_mix_and_are_refused_where_unknown() -> None:
    model = get_peft_model(llama(), "poly:n_tasks=3,n_skills=2").eval()
    randomise(model)
    ids = tokens()
    logits = model(ids, task_ids=TASKS).logits
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        together = model.generate(ids, task_ids=TASKS, num_beams=beams, **how)
        alone = model.generate(ids[1:2], task_ids=[0], num_beams=beams, **how)
        assert torch.equal(together[1, : alone.shape[1]], alone[0])
    model.add_adapter("other", "poly:n_tasks=2,target_modules=[q_proj]")
    mixed = model(ids, task_ids=[2, 0, 1], adapter_names=["default", "default", "other"]).logits
    torch.testing.assert_close(mixed[:2], logits[:2], rtol=1e-4, atol=1e-5)
    model.delete_adapter("other")
    with pytest.raises(StateError, match="has to know the task of every row"):
        model(ids)
    with pytest.raises(StateError, match=r"n_tasks=3, counted from 0"):
        model(ids, task_ids=[0, 1, 3])
    with pytest.raises(StateError, match=r"shape \(2,\), and a layer was called with 3 rows"):
        model(ids, task_ids=[0, 1])
    with pytest.raises(UnsupportedError, match="A Poly adapter changes the weight for every task"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": 1}, "task=1; with n_tasks=1"),
        ({"n_skills": 0}, "n_skills=0"),
        ({"n_splits": 3}, "n_splits=3 does not"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(llama(), PolyConfig(**settings))
