"""Prefix tuning by hand: attention over joined keys, the layout of its tensors, its starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
import veneer
from veneer.errors import CheckpointError, ConfigError, TargetError

SETTINGS: list[dict[str, Any]] = []  # needs a model with attention: see tests/prompting/test_prefixes.py
SHOWN = {"num_virtual_tokens": 4}
N = 3


def encoder(method: str = f"prefix_tuning:num_virtual_tokens={N}") -> veneer.PeftModel:
    model = veneer.get_peft_model(tiny.bert().double(), method)
    tiny.randomise(model, scale=1.0)
    return model.eval()


def attended(layer: Any, h: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What one head after the other makes of hidden states (length, 32) and of a prefix (N, 32)."""
    query, key, value = (getattr(layer, name)(h) for name in ("query", "key", "value"))
    key, value = torch.cat([keys, key]), torch.cat([values, value])
    heads = [slice(8 * head, 8 * head + 8) for head in range(4)]
    return torch.cat([(query[:, c] @ key[:, c].T / 8**0.5).softmax(-1) @ value[:, c] for c in heads], 1)


@pytest.mark.parametrize("projected", [False, True])
def test_queries_attend_to_the_prefix_under_one_softmax(projected: bool) -> None:
    model = encoder(f"prefix_tuning:num_virtual_tokens={N},prefix_projection={str(projected).lower()}")
    tensors = veneer.get_peft_model_state_dict(model)
    whole = tensors["prompt_embeddings"]
    assert whole.shape == (N, 2 * 2 * 32)  # layers, keys and values, width
    if projected:
        named = {name.removeprefix("prefix_encoder."): tensor for name, tensor in tensors.items()}
        hidden = torch.tanh(named["embedding"] @ named["transform.0.weight"].T + named["transform.0.bias"])
        torch.testing.assert_close(whole, hidden @ named["transform.2.weight"].T + named["transform.2.bias"])
    for index in (0, 1):
        layer = model.get_base_model().bert.encoder.layer[index].attention.self
        h = torch.randn(5, 32, dtype=torch.float64)
        keys, values = whole[:, 64 * index :].split(32, 1)[:2]
        torch.testing.assert_close(layer(h[None])[0][0], attended(layer.base_layer, h, keys, values))


def test_it_starts_as_it_is_told() -> None:
    model = veneer.get_peft_model(tiny.llama(), "prefix_tuning:num_virtual_tokens=400")
    whole = veneer.get_peft_model_state_dict(model)["prompt_embeddings"]
    assert abs(float(whole.std()) - 1) < 0.02
    for more in ("", ",prefix_projection=true"):
        model = veneer.get_peft_model(tiny.llama(), f"prefix_tuning:num_virtual_tokens=2,init_weights=zero{more}")
        assert not veneer.get_peft_model_state_dict(model)["prompt_embeddings"].any()


def test_what_is_counted() -> None:
    model = veneer.get_peft_model(tiny.llama(), "prefix_tuning:num_virtual_tokens=5")
    config = model.peft_config["default"]
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (2, 2, 16)  # of keys
    assert model.get_nb_trainable_parameters()[0] == 5 * 2 * 2 * 16


def test_keys_and_values_alone_are_not_trained_on(tmp_path: Path) -> None:
    """`peft` saves no network beside them."""
    model = encoder("prefix_tuning:num_virtual_tokens=2,prefix_projection=true")
    x, expected = tiny.tokens(), model(tiny.tokens()).logits
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(tiny.bert().double(), tmp_path, is_trainable=True)
    torch.testing.assert_close(again.eval()(x).logits, expected, rtol=0, atol=0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "prefix_encoder" not in k}, tmp_path / "adapter_model.safetensors")
    again = veneer.PeftModel.from_pretrained(tiny.bert().double(), tmp_path)
    torch.testing.assert_close(again(x).logits, expected)
    with pytest.raises(CheckpointError, match="not the network that they were projected by"):
        veneer.PeftModel.from_pretrained(tiny.bert().double(), tmp_path, is_trainable=True)


def test_some_layers_alone(tmp_path: Path) -> None:
    model = encoder("prefix_tuning:num_virtual_tokens=2,layers_to_transform=[1]")
    assert model.peft_config["default"].num_layers == 1
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(tiny.bert().double(), tmp_path)
    torch.testing.assert_close(again(tiny.tokens()).logits, model(tiny.tokens()).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "num_virtual_tokens is not set"),
        ({"num_virtual_tokens": 2, "places": ["middle"]}, "'middle' is none of self, encoder, cross"),
        ({"num_virtual_tokens": 2, "init_text": "a", "init_examples": True}, "two starts"),
        ({"num_virtual_tokens": 2, "init_text": "a", "prefix_projection": True}, "Leave out prefix_projection"),
        ({"num_virtual_tokens": 2, "target_modules": ["mlp"]}, "in the attention of all layers"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        veneer.get_peft_model(tiny.llama(), veneer.PrefixTuningConfig(**settings))


def test_a_place_that_the_model_lacks() -> None:
    with pytest.raises(TargetError, match=r"no attention at places=\['cross'\]; it has self"):
        veneer.get_peft_model(tiny.llama(), {"name": "prefix_tuning", "num_virtual_tokens": 2, "places": ["cross"]})
