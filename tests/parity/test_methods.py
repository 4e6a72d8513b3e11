"""Every other method here and in peft: same outputs, same trained tensors, files both ways, same ten steps.

A method's test module in `tests/methods` says what is compared: `PARITY` lists families of models and settings that
both libraries take. Modules that are adapted are the family's own unless the settings name others. Where peft computes
in float32, whatever the model's type, `TOLERANCE` says how close it comes.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pkgutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

import veneer
from parity.families import FAMILIES, Family
from parity.oracle import CONV1D, OLD_NAME, TIGHT, output, same_tensors, tensors, trained
from parity.test_training import train
from tiny import randomise
from veneer.method_strings import parse_method
from veneer.registry import methods

ROOT = Path(__file__).resolve().parent.parent
MODULES = [name for _, name, _ in pkgutil.iter_modules([str(ROOT / "methods")]) if name.startswith("test_")]
CASES = [
    pytest.param(name.removeprefix("test_"), family, changes, id=f"{name.removeprefix('test_')}-{family}-{i}")
    for name in MODULES
    for i, (family, changes) in enumerate(getattr(importlib.import_module(f"methods.{name}"), "PARITY", []))
]


@pytest.fixture(autouse=True)
def _peft_may_talk() -> Any:
    """Lets peft warn: what it says of a setting differs by method, and none of it is ours."""
    with warnings.catch_warnings():
        for message in (OLD_NAME, CONV1D):
            warnings.filterwarnings("ignore", message=message)
        warnings.filterwarnings("ignore", module=r"peft\..*")
        yield


def values(family: Family, changes: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in family.settings.items() if k != "target_parameters"}
    return copy.deepcopy({"target_modules": family.targets, **settings, **changes})


def ours(method: str, family: Family, changes: dict[str, Any]) -> veneer.PeftModel:
    model = veneer.get_peft_model(family.model(), parse_method({"name": method, **values(family, changes)}))
    randomise(model)
    return model.eval()


def theirs(method: str, family: Family, changes: dict[str, Any]) -> peft.PeftModel:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[parse_method({"name": method}).peft_type]
    preset = next(preset for name, _, preset in methods() if name == method)
    plain = {key: value for key, value in parse_method({"name": method}).to_dict().items() if key in preset}
    torch.manual_seed(0)
    model = peft.get_peft_model(family.model(), cls(**{**plain, **values(family, changes)})).eval()
    for key, parameter in model.named_parameters():
        if ".ranknum." in key:  # of AdaLoRA: trained by mistake, and not saved
            parameter.requires_grad_(False)
    return model


def tolerance(method: str, **otherwise: float) -> dict[str, float]:
    return getattr(importlib.import_module(f"methods.test_{method}"), "TOLERANCE", otherwise)


def written(there: peft.PeftModel) -> dict[str, torch.Tensor]:
    """The tensors of peft's adapter; what all layers share, which some methods write for every layer too, once."""
    given, names = tensors(there), {}
    for name in sorted(given, key=len):
        names.setdefault(given[name].data_ptr(), name)
    return {name: tensor for name, tensor in given.items() if name in names.values()}


def twins(method: str, family: Family, changes: dict[str, Any]) -> tuple[veneer.PeftModel, peft.PeftModel]:
    """Both, with the same tensors; what only ours writes to files stays here."""
    here, there = ours(method, family, changes), theirs(method, family, changes)
    given, known = tensors(here), written(there)
    assert known.keys() <= given.keys()
    peft.set_peft_model_state_dict(there, {key: given[key] for key in known})
    return here, there


@pytest.mark.parametrize(("method", "family", "changes"), CASES)
def test_outputs_and_trained_tensors(method: str, family: str, changes: dict[str, Any]) -> None:
    kind = FAMILIES[family]
    here, there = twins(method, kind, changes)
    given = written(there)
    assert trained(here) & given.keys() == trained(there) & given.keys()
    same_tensors({key: tensor for key, tensor in tensors(here).items() if key in given}, given)
    x = kind.inputs()
    torch.testing.assert_close(output(here, x), output(there, x), **tolerance(method, **TIGHT))
    assert not torch.allclose(output(here, x), output(kind.model(), x), rtol=1e-3)


@pytest.mark.parametrize(("method", "family", "changes"), CASES)
def test_files(method: str, family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    kind, x = FAMILIES[family], FAMILIES[family].inputs()
    here, there = twins(method, kind, changes)
    expected = output(there, x)
    there.save_pretrained(str(tmp_path / "theirs"))
    loaded_here = veneer.PeftModel.from_pretrained(kind.model(), tmp_path / "theirs")
    torch.testing.assert_close(output(loaded_here, x), expected, **tolerance(method, **TIGHT))
    here.save_pretrained(tmp_path / "ours")
    loaded_there = peft.PeftModel.from_pretrained(kind.model(), str(tmp_path / "ours"))
    torch.testing.assert_close(output(loaded_there, x), expected, **tolerance(method, **TIGHT))
    assert not trained(loaded_here)


@pytest.mark.parametrize(("method", "family", "changes"), CASES)
def test_ten_steps(method: str, family: str, changes: dict[str, Any]) -> None:
    kind = FAMILIES[family]
    here, there = twins(method, kind, changes)
    for module in (*here.modules(), *there.modules()):
        if isinstance(module, nn.Embedding):  # peft trains the row of padding tokens in what it adds to an embedding
            module.padding_idx = None
    before = {key: tensor.clone() for key, tensor in tensors(here).items()}
    assert train(here, kind) == pytest.approx(train(there, kind), rel=tolerance(method, rtol=1e-7)["rtol"])
    after, given = tensors(here), written(there)
    same_tensors({key: after[key] for key in given if key in after}, given, **tolerance(method, rtol=1e-6, atol=1e-8))
    assert any(not torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize(
    "peft_type", sorted({cls.peft_name for _, cls, _ in methods()} & set(PEFT_TYPE_TO_CONFIG_MAPPING))
)
def test_configurations_have_the_same_fields_and_defaults(peft_type: str) -> None:
    needed = {"ADALORA": {"total_step": 10}, "CPT": {"task_type": "CAUSAL_LM"}}.get(peft_type, {})
    here = next(cls for _, cls, _ in methods() if cls.peft_name == peft_type)(**needed)
    there = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**needed)
    # Fields that peft does not know are in no file unless they are set: it warns of them.
    assert set(here.to_dict()) <= {entry.name for entry in dataclasses.fields(there)}
    for entry in dataclasses.fields(there):
        if entry.name == "runtime_config":  # of a run, and written to no file
            continue
        default = getattr(there, entry.name)
        assert hasattr(here, entry.name), entry.name
        assert getattr(here, entry.name) == (None if default == set() else default), entry.name
