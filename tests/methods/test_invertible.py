"""Invertible adapters: the way there by hand, the way back, and both ends of a model."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import nn

from tiny import SIZES, bert, llama, randomise, tokens
from veneer import get_peft_model, parse_method
from veneer.adapted import adapters_of
from veneer.errors import ConfigError

SETTINGS = [{}, {"reduction": 1, "non_linearity": "tanh"}]


def test_the_formula_and_its_inverse() -> None:
    model = get_peft_model(nn.Sequential(nn.Embedding(4, 5)).double(), "invertible:target_modules=['0']")
    randomise(model)
    ((wrapper, adapter),) = adapters_of(model, "default")
    shared, ids = adapter.shared, torch.tensor([[0, 3, 1]])
    x = wrapper.frozen_layer(ids)
    one, two = x[..., :2], x[..., 2:]

    def network(layers: nn.Sequential, z: torch.Tensor) -> torch.Tensor:
        return torch.relu(z @ layers[0].weight.T + layers[0].bias) @ layers[2].weight.T + layers[2].bias

    one = one + network(shared.F, two)
    y = torch.cat([one, two + network(shared.G, one)], -1)
    torch.testing.assert_close(model(ids), y)
    torch.testing.assert_close(shared.back(y), x)
    assert [layer.weight.shape for layer in (shared.F[0], shared.G[0])] == [(1, 3), (1, 2)]


def test_both_ends_of_a_decoder() -> None:
    """What goes in changed comes out changed back: without blocks, the logits are those of the base model."""
    model = get_peft_model(
        llama(num_hidden_layers=0).double(),
        "invertible:target_modules=[embed_tokens,lm_head],inverse_modules=[lm_head]",
    )
    model.get_base_model().model.norm = nn.Identity()
    randomise(model)
    with model.disable_adapter():
        expected = model(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, expected)
    assert [type(adapter).__name__ for _, adapter in adapters_of(model, "default")] == ["Invertible", "Inverse"]


def test_places_on_encoders() -> None:
    found = {}
    for base in (bert(), T.BertForMaskedLM(T.BertConfig(**SIZES))):
        model = get_peft_model(base, "invertible")
        found[type(base).__name__] = [wrapper.path for wrapper, _ in adapters_of(model, "default")]
        d = SIZES["hidden_size"]
        assert model.get_nb_trainable_parameters()[0] == d * d // 2 + 3 * d // 2
    assert found == {
        "BertForSequenceClassification": ["bert.embeddings"],
        "BertForMaskedLM": ["bert.embeddings", "cls.predictions.decoder"],
    }


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reduction=0; a positive"):
        parse_method("invertible:reduction=0")
    with pytest.raises(ConfigError, match=r"norm: .*|named as the head"):
        get_peft_model(llama(), "invertible:target_modules=[embed_tokens],inverse_modules=[embed_tokens]")
