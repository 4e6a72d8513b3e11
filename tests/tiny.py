"""Tiny random models of the usual families: two layers, width 32."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
}


def llama(seed: int = 0, **changes: Any) -> T.LlamaForCausalLM:
    """A decoder with grouped queries and no biases."""
    settings = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes}
    torch.manual_seed(seed)
    return T.LlamaForCausalLM(T.LlamaConfig(**settings)).eval()


def bert(seed: int = 0, **changes: Any) -> T.BertForSequenceClassification:
    """An encoder with biases everywhere and a new head of three classes."""
    torch.manual_seed(seed)
    return T.BertForSequenceClassification(T.BertConfig(**{**SIZES, "num_labels": 3, **changes})).eval()


def mixtral(seed: int = 0) -> T.MixtralForCausalLM:
    """A decoder with stacked experts."""
    torch.manual_seed(seed)
    return T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)).eval()


def tokens(rows: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 50, (rows, length), generator=generator)


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Makes every trainable parameter random and non-zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
