"""AdaLoRA against the paper and peft; its budget step by step."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from parity.families import FAMILIES
from parity.oracle import OLD_NAME, output, same_tensors, tensors
from parity.test_training import loss_of
from tiny import llama
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, StateError, VeneerWarning
from veneer.methods.adalora import AdaLora, AdaLoraConfig

SCHEDULE: dict[str, Any] = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}
SETTINGS = [
    {"init_r": 3, "target_r": 2, "lora_alpha": 7, **SCHEDULE},
    {"init_r": 2, "target_r": 1, "lora_alpha": 3, "orth_reg_weight": 0.0},
]
SIZES: dict[str, Any] = {"init_r": 4, "target_r": 2, "lora_alpha": 7, **SCHEDULE}
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", SIZES),
    ("gpt2", {**SIZES, "orth_reg_weight": 0.1}),
    ("bert", SIZES),
    ("t5", SIZES),
    ("perceptron", {**SIZES, "target_modules": ["lin0", "lin1"]}),
    ("convolutions", {**SIZES, "target_modules": ["plane"]}),
]


@pytest.fixture(autouse=True)
def _peft_may_talk() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OLD_NAME)
        warnings.filterwarnings("ignore", module=r"peft\..*")
        yield


def twins(family: str, changes: dict[str, Any]) -> tuple[veneer.PeftModel, peft.PeftModel]:
    from parity.test_methods import twins  # which reads `PARITY` from here

    return twins("adalora", FAMILIES[family], changes)


def one_layer(**settings: Any) -> tuple[veneer.PeftModel, AdaLora]:
    layer = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    config = AdaLoraConfig(init_r=2, target_r=1, lora_alpha=6, target_modules=["0"], **settings)
    model = get_peft_model(nn.Sequential(layer), config)
    ((_, adapter),) = adapters_of(model, "default")
    assert isinstance(adapter, AdaLora)
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        adapter.values.copy_(torch.tensor([[2.0], [-1.0]]))
        adapter.up.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    return model, adapter


def test_the_formula_and_the_penalty_by_hand() -> None:
    model, adapter = one_layer()
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    # diag(2, -1) down = [[2, 0], [-1, -1]]; up of it = [[0, -2], [-1, -1]]; times 6 / 2.00001.
    expected = torch.tensor([[3.0, 7.0]], dtype=torch.float64) - 12 / 2.00001
    assert torch.allclose(model(x), expected, rtol=1e-12)
    # down down^T - I = [[0, 1], [1, 1]], up^T up - I = [[0, 2], [2, 4]].
    penalty = AdaLora.penalty([adapter], AdaLoraConfig(orth_reg_weight=0.3))
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.3 * (3**0.5 + 24**0.5) / 2, rel=1e-12)


def test_importance_by_hand() -> None:
    _, adapter = one_layer(total_step=10)
    for step in range(2):
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, float(step + 1))
        adapter.observe(0.5, 0.25)
    # |p g| is |p|, then 2 |p|: the averages are .5 |p| and 1.25 |p|; the deviations .5 |p| and .75 |p| give .375 |p|
    # and .25 * .375 |p| + .75 * .75 |p|.
    factor = 1.25 * (0.25 * 0.375 + 0.75 * 0.75)
    # values^2 + mean over the row of down^2 + mean over the column of up^2
    expected = factor * torch.tensor([4 + 0.5 + 0.5, 1 + 1 + 2.5], dtype=torch.float64)
    assert torch.allclose(adapter.scores(), expected, rtol=1e-12)


def test_the_number_of_parameters() -> None:
    model = get_peft_model(llama(), "adalora:init_r=4,target_r=2,target_modules=[q_proj]")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 4 * (32 + 32 + 1)


@pytest.mark.parametrize("deltaT", [1, 2])  # as in peft
@pytest.mark.parametrize("family", ["llama", "bert", "convolutions"])
def test_the_budget_step_by_step_as_in_peft(family: str, deltaT: int) -> None:
    kind = FAMILIES[family]
    changes = {**SIZES, "deltaT": deltaT, **({"target_modules": ["plane"]} if family == "convolutions" else {})}
    here, there = twins(family, changes)
    optimizers = []
    for model in (here, there):
        model.train()
        optimizers.append(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    ranks = []
    for step in range(SIZES["total_step"]):
        for model, optimizer in zip((here, there), optimizers, strict=True):
            loss_of(model, kind, step).backward()
            optimizer.step()
        here.base_model.update_and_allocate(step)  # as scripts for peft call it
        there.base_model.update_and_allocate(step)
        for _, optimizer in zip((here, there), optimizers, strict=True):
            optimizer.zero_grad()
        adapters = [adapter for _, adapter in adapters_of(here, "default") if isinstance(adapter, AdaLora)]
        modules = [module for module in there.modules() if hasattr(module, "lora_E")]
        for adapter, module in zip(adapters, modules, strict=True):
            torch.testing.assert_close(adapter.values, module.lora_E["default"], rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(adapter.down, module.lora_A["default"], rtol=1e-8, atol=1e-12)
        ranks.append(sum(int((adapter.values != 0).sum()) for adapter in adapters))
    assert ranks[0] == 4 * len(adapters)
    assert ranks[-1] == 2 * len(adapters)
    said = {key.replace(".default", ""): mask for key, mask in there.peft_config["default"].rank_pattern.items()}
    assert here.peft_config["default"].rank_pattern == said


def pruned() -> veneer.PeftModel:
    """A trained model, of which half of the triplets are gone."""
    kind = FAMILIES["llama"]
    model = get_peft_model(kind.model(), AdaLoraConfig(target_modules=kind.targets, task_type="CAUSAL_LM", **SIZES))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for step in range(SIZES["total_step"]):
        loss_of(model.train(), kind, step).backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def test_pruned_adapters_are_saved_without_what_is_gone(tmp_path: Path) -> None:
    kind = FAMILIES["llama"]
    x, model = kind.inputs(), pruned()
    expected = output(model, x)
    model.save_pretrained(tmp_path)
    rows = sum(tensor.shape[0] for key, tensor in tensors(model).items() if key.endswith("lora_A"))
    assert rows == 2 * 6
    loaded = veneer.PeftModel.from_pretrained(kind.model(), tmp_path, is_trainable=True)
    torch.testing.assert_close(output(loaded, x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        output(peft.PeftModel.from_pretrained(kind.model(), str(tmp_path)), x), expected, rtol=1e-9, atol=1e-10
    )
    # Saved again, and trained further, it keeps the ranks it has.
    loaded.update_and_allocate(5)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["rank_pattern"] is not None
    again = veneer.PeftModel.from_pretrained(kind.model(), tmp_path / "again")
    same_tensors(tensors(again), tensors(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, x), expected, rtol=1e-9, atol=1e-10)


def test_pruned_files_of_peft(tmp_path: Path) -> None:
    kind = FAMILIES["llama"]
    _, there = twins("llama", SIZES)
    optimizer = torch.optim.SGD([p for p in there.parameters() if p.requires_grad], lr=1.0)
    for step in range(SIZES["total_step"]):
        loss_of(there.train(), kind, step).backward()
        optimizer.step()
        there.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = output(there.eval(), kind.inputs())
    there.save_pretrained(str(tmp_path))
    loaded = veneer.PeftModel.from_pretrained(kind.model(), tmp_path)
    torch.testing.assert_close(output(loaded, kind.inputs()), expected, rtol=1e-9, atol=1e-10)


def test_between_two_choices_files_hold_all_triplets(tmp_path: Path) -> None:
    kind = FAMILIES["llama"]
    model = get_peft_model(kind.model(), AdaLoraConfig(target_modules=kind.targets, task_type="CAUSAL_LM", **SIZES))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for step in range(6):  # the last one after a choice at step 4
        loss_of(model.train(), kind, step).backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        assert (model.peft_config["default"].rank_pattern is not None) == (step == 4)
    model.eval().save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(kind.model(), tmp_path)
    assert torch.equal(output(loaded, kind.inputs()), output(model, kind.inputs()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 9, "init_r": 8}, "target_r=9 is above init_r=8"),
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, "leave no step to prune in"),
        ({"beta1": 1.0}, r"beta1=1.0; a number in \(0, 1\)"),
        ({"use_dora": True}, "use_dora=True is not for AdaLoRA"),
        ({"lora_bias": True}, "lora_bias=True is not for AdaLoRA"),
        ({"init_lora_weights": "gaussian"}, "the method has a start of its own"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"tfinal": -1}, "cannot be negative"),
    ],
)
def test_settings_that_contradict_the_method_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaLoraConfig(**settings)


def test_the_length_of_the_training_has_to_be_known() -> None:
    model, _ = one_layer()
    with pytest.raises(ConfigError, match="set total_step"):
        model.update_and_allocate(0)


def test_a_training_that_ends_before_the_schedule_is_said() -> None:
    with pytest.warns(VeneerWarning, match="total_step=100, but the training has 50 steps"):
        AdaLoraConfig(total_step=100).begin(50)
    with pytest.raises(ConfigError, match="leave no step to prune in"):
        AdaLoraConfig(tinit=30, tfinal=20).begin(50)


def test_a_choice_without_steps_before_it_is_an_error() -> None:
    model, _ = one_layer(total_step=10, tfinal=5)
    with pytest.raises(StateError, match="has seen no step"):
        model.update_and_allocate(5)


def test_a_place_may_lose_all_its_triplets(tmp_path: Path) -> None:
    model, adapter = one_layer(total_step=10)
    with torch.no_grad():
        adapter.values.zero_()
    adapter.mask.fill_(False)
    model.peft_config["default"].rank_pattern = AdaLora.pattern({"0": adapter})
    x = torch.randn(3, 2, dtype=torch.float64)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    base = model.unload()
    loaded = veneer.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ((_, adapter),) = adapters_of(loaded, "default")
    assert adapter.down.shape == (0, 2)
    assert torch.equal(loaded(x), expected)
    assert AdaLora.penalty([adapter], AdaLoraConfig()) == 0
    assert torch.equal(loaded.merge_and_unload()(x), expected)


def test_the_rank_of_lora_has_no_meaning() -> None:
    with pytest.warns(VeneerWarning, match="r=4 has no meaning in AdaLoRA"):
        get_peft_model(llama(), "adalora:r=4")
