"""`bias=`: the base model's own biases are trained beside the method, as deltas that belong to the adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch

import veneer
from parity.families import FAMILIES
from parity.oracle import TIGHT, load_here, load_there, output, peft_says, same_tensors, settings, tensors
from parity.test_training import train
from veneer.errors import ConfigError

CASES = [("llama", "lora_only"), ("llama", "all"), ("bert", "all"), ("bert", "lora_only"), ("convolutions", "all")]


def pair(family: str, bias: str) -> tuple[veneer.PeftModel, peft.PeftModel]:
    kind = FAMILIES[family]
    values = settings(kind, bias=bias)
    torch.manual_seed(0)
    here = veneer.get_peft_model(kind.model(), veneer.LoraConfig(**copy.deepcopy(values))).eval()
    there = peft.get_peft_model(kind.model(), peft.LoraConfig(**copy.deepcopy(values))).eval()
    return here, there


def randomise_both(here: veneer.PeftModel, there: peft.PeftModel) -> None:
    """Random tensors in peft's model, the same in ours."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in there.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    veneer.set_peft_model_state_dict(here, tensors(there))


@pytest.mark.parametrize(("family", "bias"), CASES)
def test_outputs_steps_and_files(family: str, bias: str, tmp_path: Path) -> None:
    kind = FAMILIES[family]
    with peft_says("Setting `save_embedding_layers`"):
        here, there = pair(family, bias)
        randomise_both(here, there)
        x = kind.inputs()
        torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
        # Weight decay draws a delta to the base model's bias; peft's whole bias it draws to zero.
        assert train(here, kind, 0) == pytest.approx(train(there, kind, 0), rel=1e-7)
        mine = {key: tensor for key, tensor in tensors(here).items() if not key.endswith("_delta")}
        # peft writes the biases of heads three times.
        others = {
            key: tensor
            for key, tensor in tensors(there).items()
            if "s_to_save.b" not in key and "l_module.b" not in key
        }
        same_tensors(mine, others, rtol=1e-6, atol=1e-8)
        here.eval().save_pretrained(tmp_path / "ours")
        there.eval().save_pretrained(str(tmp_path / "theirs"))
        torch.testing.assert_close(output(load_here(kind, tmp_path / "theirs"), x), output(there, x), **TIGHT)
        torch.testing.assert_close(output(load_there(kind, tmp_path / "ours"), x), output(here, x), **TIGHT)
        same_tensors(tensors(load_here(kind, tmp_path / "ours")), tensors(here))


def test_what_peft_forgets_a_bias_belongs_to_its_adapter() -> None:
    kind = FAMILIES["bert"]
    with peft_says():
        here, there = pair("bert", "all")
    randomise_both(here, there)
    x, base = kind.inputs(), kind.model()
    with here.disable_adapter():
        torch.testing.assert_close(output(here, x), output(base, x), **TIGHT)
    here.add_adapter("second", veneer.LoraConfig(**settings(kind, bias="all")))
    here.set_adapter("second")
    torch.testing.assert_close(output(here, x), output(base, x), rtol=1e-6, atol=1e-8)
    here.set_adapter("default")
    expected = output(here, x)
    torch.testing.assert_close(expected, output(there, x), **TIGHT)
    here.merge_adapter()
    torch.testing.assert_close(output(here, x), expected, **TIGHT)
    here.unmerge_adapter()
    assert torch.equal(output(here, x), expected)


def test_only_the_named_words_are_taken() -> None:
    with pytest.raises(ConfigError, match=r"LoraConfig: bias='some'; one of none, all, lora_only was expected"):
        veneer.LoraConfig(bias="some")
