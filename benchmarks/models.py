"""Models that several benchmarks use."""

from __future__ import annotations

from typing import Any

SUBWORDS = 128


def narrow_llama(layers: int, width: int = 64) -> Any:
    """A Llama of usual depth and next to no width: what is left is the cost a module, seven linears a layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=SUBWORDS,
    )
    return LlamaForCausalLM(config).eval()


def tokens(rows: int, length: int, vocabulary: int = SUBWORDS) -> Any:
    """A batch of random token ids, the same each time."""
    import torch

    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
