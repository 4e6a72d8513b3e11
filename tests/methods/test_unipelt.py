"""UniPELT and Mix-and-Match against their formulas; what they promise on models is in tests/contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import bert, llama, randomise, tokens
from veneer import get_peft_model
from veneer.adapted import adapters_of
from veneer.errors import ConfigError
from veneer.methods.unipelt import UniPelt, UniPeltConfig, attended

SETTINGS: list[dict[str, Any]] = []  # needs a whole model: see tests/contract/test_whole_models.py


def test_gates_are_means_over_what_a_token_may_see() -> None:
    for make, causal in ((llama, True), (bert, False)):
        model = get_peft_model(make().double(), "unipelt:num_virtual_tokens=2").eval()
        randomise(model)
        ids, mask = tokens(), torch.ones(3, 7, dtype=torch.long)
        mask[1, :2] = 0
        seen: dict[str, torch.Tensor] = {}
        gates: dict[str, Any] = {}
        for wrapper, adapter in adapters_of(model.get_base_model(), "default"):
            if isinstance(adapter, UniPelt) and adapter.name == "gate":
                gates[wrapper.path] = adapter
                wrapper.register_forward_pre_hook(
                    lambda module, args, kwargs, path=wrapper.path, seen=seen: seen.update({path: args[0]}),
                    with_kwargs=True,
                )
        model(ids, attention_mask=mask)
        for path, adapter in gates.items():
            each = torch.sigmoid(seen[path] @ adapter.inner.weight.T)
            found = adapter.shared.parts["gate"].now[path]
            for row in range(3):
                for token in range(7):
                    if not mask[row, token]:
                        continue
                    may = [u for u in range(7) if mask[row, u] and (u <= token or not causal)]
                    torch.testing.assert_close(found[row, token], each[row, may].mean(0), rtol=1e-12, atol=1e-12)


def test_masks_of_all_forms_say_the_same() -> None:
    like = torch.zeros((), dtype=torch.float64)
    two = torch.tensor([[0, 1, 1], [1, 1, 1]])
    whole = attended(two, 3, 3, True, like)
    assert whole.tolist() == [[[0, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    added = torch.zeros(2, 1, 3, 3).masked_fill(whole[:, None] == 0, torch.finfo(torch.float32).min)
    assert torch.equal(attended(added, 3, 3, True, like), whole)
    assert torch.equal(attended(whole[:, None].bool(), 3, 3, True, like), whole)
    assert attended(None, 1, 3, True, like).tolist() == [[[1, 1, 1]]]
    assert attended(None, 2, 3, True, like).tolist() == [[[1, 1, 0], [1, 1, 1]]]
    assert attended(None, 2, 2, False, like).tolist() == [[[1, 1], [1, 1]]]


def test_the_numbers_of_parameters() -> None:
    def count(method: str) -> int:
        return get_peft_model(llama(), method).get_nb_trainable_parameters()[0]

    # A layer: gates; q (32 to 32) and v (32 to 16) of rank 4; keys and values of 16 numbers; d 32, m 4.
    layer = 3 * 32 + 4 * (32 + 32 + 32 + 16) + 5 * 2 * 16 + 2 * 32 * 4 + 4 + 32
    assert count("unipelt:r=4,num_virtual_tokens=5,reduction=8") == 2 * layer
    assert count("mam:num_virtual_tokens=5,bottleneck_size=6") == 2 * (5 * 2 * 16 + 2 * 32 * 6 + 6 + 32)


@pytest.mark.parametrize("method", ["unipelt", "mam"])
def test_places_cannot_be_named(method: str) -> None:
    with pytest.raises(ConfigError, match="is where its parts are"):
        get_peft_model(llama(), f"{method}:target_modules=[q_proj]")
    with pytest.raises(ConfigError, match="num_virtual_tokens=0"):
        get_peft_model(llama(), f"{method}:num_virtual_tokens=0")
    assert UniPeltConfig().to_dict().keys().isdisjoint({"made", "_here"})
