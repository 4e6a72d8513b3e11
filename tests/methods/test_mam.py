"""Mix-and-Match is prefixes and parallel adapters; what it promises on models is in tests/contract."""

from __future__ import annotations

from typing import Any

import torch

from tiny import bert, randomise, tokens
from veneer import get_peft_model
from veneer.checkpoint import adapter_tensors, fill

SETTINGS: list[dict[str, Any]] = []  # needs a whole model: see tests/contract/test_whole_models.py


def test_it_is_both_of_its_parts() -> None:
    model = get_peft_model(bert().double(), "mam:num_virtual_tokens=3,bottleneck_size=5").eval()
    randomise(model)
    tensors = adapter_tensors(model.get_base_model(), "default")
    both = get_peft_model(bert().double(), "parallel:bottleneck_size=5,scaling=4.0", "beside")
    both.add_adapter("prefix", "prefix_tuning:num_virtual_tokens=3")
    prefix = tensors.pop("base_model.prefix.prompt_embeddings")
    fill(both.get_base_model(), "beside", tensors)
    fill(both.get_base_model(), "prefix", {"prompt_embeddings": prefix})
    both.set_adapter(["prefix", "beside"])
    ids, positions = tokens(), torch.arange(7).expand(3, 7)
    expected = both.eval()(ids, position_ids=positions).logits
    with torch.no_grad():
        shifted = both.base_model(ids, position_ids=positions).logits  # where the text begins at 0
    found = model(ids).logits
    assert torch.allclose(found, shifted, rtol=1e-10) or torch.allclose(found, expected, rtol=1e-10)
