"""(IA)^3 against the paper and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from parity.oracle import output, peft_says
from tiny import bert, llama, randomise, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, VeneerWarning
from veneer.methods.ia3 import IA3Config

SETTINGS = [{"feedforward_modules": []}, {"feedforward_modules": ".*"}]
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"feedforward_modules": None}),
    ("gpt2", {"feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}),
    ("bert", {"feedforward_modules": r".*\d\.output\.dense"}),
    ("t5", {"target_modules": None}),
    ("vit", {"feedforward_modules": ["projection"]}),
    ("convolutions", {"target_modules": ["plane", "space"], "feedforward_modules": ["space"]}),
]


def test_outputs_and_feed_forward_inputs_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            layer.bias.copy_(torch.tensor([1.0, -1.0]))
    model = get_peft_model(model, IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    with torch.no_grad():
        for _, adapter in adapters_of(model, "default"):
            adapter.scale.copy_(torch.tensor([2.0, 0.5]))
    # Layer 0: (1 + 2 + 1, 3 + 4 - 1) = (4, 6), scaled (8, 3). Layer 1 sees (16, 1.5): (16 + 3 + 1, 48 + 6 - 1).
    assert torch.equal(model(torch.ones(1, 2).double()), torch.tensor([[20.0, 53.0]], dtype=torch.float64))


def test_as_many_parameters_as_the_paper_states() -> None:
    # Section 3.3: d_k + d_v + d_ff for each block.
    model = get_peft_model(llama(), IA3Config())
    assert model.get_nb_trainable_parameters()[0] == 2 * (16 + 16 + 48)
    assert model.peft_config["default"].feedforward_modules == ["down_proj"]
    adapted = get_peft_model(bert(), IA3Config())
    places = {wrapper.path for wrapper, _ in adapters_of(adapted, "default")}
    assert places == {
        f"bert.encoder.layer.{i}.{name}"
        for i in range(2)
        for name in ("attention.self.key", "attention.self.value", "output.dense")
    }


@pytest.mark.parametrize("given", [None, ["output.dense"]])
def test_feed_forward_modules_are_written_as_peft_reads_them(given: Any, tmp_path: Path) -> None:
    model = get_peft_model(bert(), IA3Config(feedforward_modules=given))
    randomise(model)
    model.save_pretrained(tmp_path)
    with peft_says():
        there = peft.PeftModel.from_pretrained(bert(), str(tmp_path))
    x = {"input_ids": tokens()}
    torch.testing.assert_close(output(there.eval(), x), output(model.eval(), x), rtol=1e-5, atol=1e-5)


def test_random_start() -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), IA3Config(init_ia3_weights=False))
    assert all((adapter.scale != 1).all() for _, adapter in adapters_of(model, "default"))


def test_where_feed_forward_outputs_cannot_be_found_they_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"Name them in feedforward_modules; \[\] scales"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), IA3Config(target_modules=["0"]))
    model = get_peft_model(llama(), IA3Config(target_modules=["k_proj"]))
    assert model.peft_config["default"].feedforward_modules == []


def test_feed_forward_modules_that_match_nothing_are_said() -> None:
    with pytest.warns(VeneerWarning, match=r"feedforward_modules: \['dwn_proj'\] match none"):
        get_peft_model(llama(), IA3Config(feedforward_modules=["dwn_proj"]))
