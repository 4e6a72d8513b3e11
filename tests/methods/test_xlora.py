"""X-LoRA against peft, and what it has besides: a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from parity.families import FAMILIES
from parity.oracle import TIGHT, output, peft_says, same_tensors, take, tensors, trained
from tiny import randomise
from veneer.errors import CheckpointError
from veneer.methods.xlora import XloraConfig

SETTINGS: list[dict[str, Any]] = []  # needs a whole model: see tests/contract/test_whole_models.py
CASES = [
    ("llama", {}),
    ("llama", {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 6, "softmax_temperature": 0.5}),
    ("llama", {"top_k_lora": 2, "global_scaling_weight": 1.5, "xlora_depth": 2, "xlora_size": 6, "xlora_dropout_p": 0}),
    ("llama", {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True}),
]


def folders(family: str, where: Path) -> dict[str, str]:
    """Three trained LoRA adapters."""
    kind = FAMILIES[family]
    found = {}
    for i in range(3):
        model = veneer.get_peft_model(
            kind.model(), veneer.LoraConfig(r=2 + i, lora_alpha=5 - i, target_modules=kind.targets)
        )
        randomise(model, seed=i)
        found[str(i)] = str(where / str(i))
        model.save_pretrained(found[str(i)])
    return found


def twins(family: str, adapters: dict[str, str], **settings: Any) -> tuple[veneer.PeftModel, peft.PeftModel]:
    kind = FAMILIES[family]
    here = veneer.get_peft_model(kind.model(), XloraConfig(adapters=adapters, **settings))
    randomise(here)
    theirs: Any = kind.model()
    theirs.config.use_cache = False  # peft has no cache with it
    with peft_says("`enable_softmax"):
        config = peft.XLoraConfig(adapters=adapters, hidden_size=32, **settings)
        there = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    take(there, here)
    return here.eval(), there.eval()


def classifier(there: peft.PeftModel) -> dict[str, torch.Tensor]:
    """What peft trains, by the names that it loads."""
    return {key: tensor for key, tensor in there.state_dict().items() if "internal_xlora_classifier" in key}


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_it_is_that_of_peft(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    kind, adapters = FAMILIES[family], folders(family, tmp_path)
    here, there = twins(family, adapters, **settings)
    same_tensors(tensors(here), classifier(there))
    assert trained(here) == set(tensors(here)) == {n for n, p in there.named_parameters() if p.requires_grad}
    x = kind.inputs()
    expected = output(there, x)
    torch.testing.assert_close(output(here, x), expected, **TIGHT)
    assert not torch.allclose(expected, output(kind.model(), x), rtol=1e-3)
    here.save_pretrained(tmp_path / "ours")
    base: Any = kind.model()
    base.config.use_cache = False
    with peft_says("`enable_softmax"):
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours"), autocast_adapter_dtype=False)
    torch.testing.assert_close(output(loaded, x), expected, **TIGHT)
    # peft takes the number of a classifier's layer for the name of another adapter, and leaves it out of its file.
    there.save_pretrained(str(tmp_path / "theirs"))
    if not (there.peft_config["default"].xlora_depth > 1 and load_file(tmp_path / "theirs/adapter_model.safetensors")):
        with pytest.raises(CheckpointError, match=r"missing .*internal_xlora_classifier"):
            veneer.PeftModel.from_pretrained(kind.model(), tmp_path / "theirs")
    save_file(classifier(there), tmp_path / "theirs/adapter_model.safetensors")
    again = veneer.PeftModel.from_pretrained(kind.model(), tmp_path / "theirs")
    torch.testing.assert_close(output(again, x), expected, **TIGHT)
