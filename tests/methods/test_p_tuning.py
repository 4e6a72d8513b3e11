"""P-tuning: its networks, computed by hand, and files without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
import veneer
from tiny import randomise
from veneer.errors import CheckpointError, ConfigError, VeneerWarning

SETTINGS: list[dict[str, Any]] = []  # needs a model that reads text: see tests/prompting/test_prompts.py


def adapted(**settings: Any) -> veneer.PeftModel:
    config = veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=5, **settings)
    model = veneer.get_peft_model(tiny.llama().double(), config)
    randomise(model)
    return model.eval()


def test_the_perceptron() -> None:
    given = veneer.get_peft_model_state_dict(adapted())
    x = given["prompt_encoder.embedding"]
    for layer in (0, 2, 4):
        weight, bias = (given[f"prompt_encoder.network.{layer}.{name}"] for name in ("weight", "bias"))
        x = (x if layer == 0 else x.relu()) @ weight.T + bias
    torch.testing.assert_close(given["prompt_embeddings"], x)


def one_way(given: dict[str, Tensor], x: Tensor, suffix: str) -> Tensor:
    """One layer of an LSTM in one direction, (n, in) to (n, h)."""
    w, u, b, c = (
        given[f"prompt_encoder.network.lstm.{name}_l{suffix}"]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = state = x.new_zeros(5)
    steps = []
    for token in x:
        i, f, g, o = (w @ token + b + u @ hidden + c).chunk(4)
        state = f.sigmoid() * state + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * state.tanh()
        steps.append(hidden)
    return torch.stack(steps)


def test_the_lstm() -> None:
    model = adapted(encoder_reparameterization_type="LSTM", encoder_num_layers=2, encoder_dropout=0.5)
    given = veneer.get_peft_model_state_dict(model.train())  # a file is written without dropout
    x = given["prompt_encoder.embedding"]
    for layer in "01":
        back = one_way(given, x.flip(0), f"{layer}_reverse").flip(0)
        x = torch.cat([one_way(given, x, layer), back], 1)
    for layer in (0, 2):
        weight, bias = (given[f"prompt_encoder.network.top.{layer}.{name}"] for name in ("weight", "bias"))
        x = (x if layer == 0 else x.relu()) @ weight.T + bias
    torch.testing.assert_close(given["prompt_embeddings"], x)
    assert all(module.training for module in model.modules())


def test_a_file_without_the_network_is_for_use_alone(tmp_path: Path) -> None:
    model, ids = adapted(), tiny.tokens()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"]}, file)  # as peft writes it
    loaded = veneer.PeftModel.from_pretrained(tiny.llama().double(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    with pytest.raises(CheckpointError, match="without is_trainable"):
        veneer.PeftModel.from_pretrained(tiny.llama().double(), tmp_path, is_trainable=True)


def test_settings_that_mean_nothing() -> None:
    with pytest.warns(VeneerWarning, match="those of the LSTM"):
        veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_dropout=0.1)
    with pytest.raises(ConfigError, match="MLP, LSTM"):
        veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="GRU")
    assert veneer.PromptEncoderReparameterizationType.MLP == "MLP"
