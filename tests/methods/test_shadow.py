"""Shadow against peft, and with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from parity.families import FAMILIES
from parity.oracle import TIGHT, output, peft_says, same_tensors, tensors, trained
from parity.test_training import train
from tiny import llama, randomise
from veneer.errors import ConfigError, TargetError
from veneer.methods.shadow import ShadowConfig

SETTINGS: list[dict[str, Any]] = []  # needs a whole model: see tests/contract/test_whole_models.py
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"shadow_hidden_size": 16, "shadow_num_hidden_layers": 2, "update_hidden_size": 5}),
    ("llama", {"share_embeddings": False, "target_modules": ["model.layers.1"], "shadow_intermediate_size": 24}),
    ("gpt2", {"r": 3, "shadow_alpha": 0.5}),
]


def twins(family: str, settings: dict[str, Any]) -> tuple[veneer.PeftModel, peft.PeftModel]:
    kind = FAMILIES[family]
    values = {"task_type": "CAUSAL_LM", "shadow_dropout": 0.0, **settings}
    here = veneer.get_peft_model(kind.model(), ShadowConfig(**values))
    randomise(here)
    with peft_says():
        there = peft.get_peft_model(kind.model(), peft.ShadowConfig(**values), autocast_adapter_dtype=False).double()
        peft.set_peft_model_state_dict(there, tensors(here))
    return here.eval(), there.eval()


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_it_is_that_of_peft(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    kind = FAMILIES[family]
    here, there = twins(family, settings)
    same_tensors(tensors(here), tensors(there))
    unused = {"base_model.shadow_backbone.default.wte.weight"}  # peft trains it, without a gradient
    assert trained(here) == trained(there) - unused
    x = kind.inputs()
    expected = output(there, x)
    torch.testing.assert_close(output(here, x), expected, **TIGHT)
    assert not torch.allclose(expected, output(kind.model(), x), rtol=1e-3)
    here.save_pretrained(tmp_path / "ours")
    there.save_pretrained(str(tmp_path / "theirs"))
    again = veneer.PeftModel.from_pretrained(kind.model(), tmp_path / "theirs")
    torch.testing.assert_close(output(again, x), expected, **TIGHT)
    with peft_says():
        loaded = peft.PeftModel.from_pretrained(kind.model(), str(tmp_path / "ours"), autocast_adapter_dtype=False)
        peft.set_peft_model_state_dict(loaded.double(), tensors(here))  # in the precision that they were saved in
    torch.testing.assert_close(output(loaded, x), expected, **TIGHT)


def test_ten_steps_with_its_own_loss_are_those_of_peft() -> None:
    here, there = twins("llama", {"auxiliary_loss_weight": 0.3})
    kind = FAMILIES["llama"]
    assert train(here, kind) == pytest.approx(train(there, kind), rel=1e-7)
    same_tensors(tensors(here), tensors(there), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 0}, ConfigError, "r=0"),
        ({"shadow_model": "some", "shadow_hidden_size": 4}, ConfigError, "shadow_hidden_size is for"),
        ({"target_modules": ["q_proj"]}, TargetError, "whole transformer blocks"),
        ({"layers_to_transform": [5]}, TargetError, "whole transformer blocks"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        veneer.get_peft_model(llama(), ShadowConfig(**settings))
