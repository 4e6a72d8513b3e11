"""The last blocks and the head: which parameters, how many, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from parity.families import FAMILIES
from tiny import bert, llama, randomise, tokens
from veneer import get_peft_model, parse_method
from veneer.adapted import wrappers
from veneer.errors import ConfigError, TargetError
from veneer.methods.last_layers import LastLayersConfig

SETTINGS = [{}]


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda m: count(m.model.layers[1], m.model.norm, m.lm_head)),
        ({"layers": 2}, lambda m: count(*m.model.layers, m.model.norm, m.lm_head)),
        ({"layers": 0}, lambda m: count(m.model.norm, m.lm_head)),
        ({"head": False}, lambda m: count(m.model.layers[1])),
    ],
)
def test_as_many_parameters_as_the_blocks_have(settings: dict[str, Any], expected: Any) -> None:
    plain = llama()
    model = get_peft_model(llama(), LastLayersConfig(**settings))
    assert model.get_nb_trainable_parameters()[0] == expected(plain)
    x = tokens()
    assert torch.equal(model(x).logits, plain(x).logits)


def test_a_new_head_is_trained_with_every_number_of_blocks() -> None:
    plain = bert()
    model = get_peft_model(bert(), parse_method({"name": "head", "task_type": "SEQ_CLS"}))
    assert model.get_nb_trainable_parameters()[0] == count(plain.bert.pooler, plain.classifier)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "vit"])
def test_other_families(family: str) -> None:
    base = FAMILIES[family].model()
    paths = {wrapper.path for wrapper in wrappers(get_peft_model(base, LastLayersConfig()))}
    assert not any("encoder.block" in path or ".0." in path.replace(".layer.0.", ".") for path in paths)
    assert any(path.endswith(("lm_head", "classifier")) for path in paths)


def test_no_gradient_flows_below() -> None:
    model = get_peft_model(llama(), LastLayersConfig())
    randomise(model)
    seen: list[bool] = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    model(tokens()).logits.sum().backward()
    assert seen == [False]


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="layers=0, head=False"):
        LastLayersConfig(layers=0, head=False)
    with pytest.raises(TargetError, match="layers=3: LlamaForCausalLM has 2 blocks"):
        get_peft_model(llama(), LastLayersConfig(layers=3))
    with pytest.raises(TargetError, match="Sequential has 0 blocks"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LastLayersConfig())
