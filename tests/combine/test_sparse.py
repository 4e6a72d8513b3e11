"""Sums of sparse adapters: exact, sparse, and refused where there is more to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tiny import bert, llama, randomise, tokens
from veneer.adapted import adapters_of
from veneer.errors import ConfigError, UnsupportedError

# Of three methods, with entries of their own and in common.
METHODS = {"a": "shira:r=2,random_seed=1", "b": "sparse:density=0.1", "c": "spiel:density=0.05"}


def model() -> veneer.PeftModel:
    adapted = veneer.get_peft_model(llama().double(), METHODS["a"], adapter_name="a", autocast_adapter_dtype=False)
    for name in ("b", "c"):
        adapted.add_adapter(name, METHODS[name], autocast_adapter_dtype=False)
    adapted.set_adapter(["a", "b", "c"])
    randomise(adapted)
    return adapted.eval()


def changes(adapted: veneer.PeftModel, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight."""
    found = {}
    for wrapper, adapter in adapters_of(adapted.get_base_model(), name):
        assert adapter.site is not None
        zero = torch.zeros(adapter.site.shape, dtype=torch.float64)
        found[wrapper.path] = adapter.adapt(zero).detach()  # type: ignore[operator]
    return found


def test_a_sum_is_that_of_the_changes() -> None:
    adapted = model()
    adapted.add_weighted_adapter(["a", "b", "c"], [1.0, -0.5, 2.0], "sum", combination_type="linear")
    parts = [changes(adapted, name) for name in "abc"]
    found = changes(adapted, "sum")
    assert found.keys() == set().union(*parts)
    for path, change in found.items():
        expected = torch.zeros_like(change)
        for weight, part in zip((1.0, -0.5, 2.0), parts, strict=True):
            if path in part:
                expected = expected + weight * part[path]
        assert torch.equal(change, expected), path
    held = sum(adapter.values.numel() for _, adapter in adapters_of(adapted.get_base_model(), "sum"))  # type: ignore[misc]
    assert held == sum(int((change != 0).sum()) for change in found.values())


def test_what_is_added_and_taken_away_again_leaves_the_first() -> None:
    adapted = model()
    x = tokens()
    adapted.set_adapter("a")
    alone = adapted(x).logits
    adapted.add_weighted_adapter(["a", "c"], [1.0, 1.0], "both", combination_type="linear")
    adapted.add_weighted_adapter(["both", "c"], [1.0, -1.0], "back", combination_type="linear")
    adapted.set_adapter("back")
    torch.testing.assert_close(adapted(x).logits, alone, rtol=1e-12, atol=1e-12)
    adapted.add_weighted_adapter(["c", "c"], [1.0, -1.0], "nothing", combination_type="linear")
    adapted.set_adapter("nothing")
    with adapted.disable_adapter():
        base = adapted(x).logits
    assert torch.equal(adapted(x).logits, base)


def test_a_sum_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    adapted = model()
    adapted.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", combination_type="linear")
    adapted.set_adapter("sum")
    expected = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = veneer.PeftModel.from_pretrained(llama().double(), tmp_path / "sum", autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-12, atol=1e-12)
    loss = adapted.train()(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    merged = adapted.eval().merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"combination_type": "svd"}, ConfigError, "Pass combination_type='linear' alone"),
        ({"combination_type": "linear", "svd_rank": 3}, ConfigError, "svd_rank"),
        ({"combination_type": "linear", "weights": [1.0]}, ConfigError, "one weight each"),
    ],
)
def test_arguments_that_do_not_fit(how: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        model().add_weighted_adapter(["a", "b"], **{"weights": [1.0, 1.0], "adapter_name": "sum", **how})


def test_adapters_that_train_more_have_no_sum() -> None:
    headed = veneer.get_peft_model(bert(), "sparse:density=0.1,task_type=SEQ_CLS")
    with pytest.raises(UnsupportedError, match="trains whole modules"):
        headed.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    dense = veneer.get_peft_model(llama(), "diff_pruning")
    with pytest.raises(UnsupportedError, match="dense delta"):
        dense.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    both = veneer.get_peft_model(llama(), "supertuning:r=2,sparsity=0.9")
    with pytest.raises(UnsupportedError, match="low-rank part"):
        both.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    mixed = veneer.get_peft_model(llama(), "sparse:density=0.1", adapter_name="s")
    mixed.add_adapter("l", "lora:r=2")
    with pytest.raises(UnsupportedError, match="cannot be combined"):
        mixed.add_weighted_adapter(["s", "l"], [1.0, 1.0], "sum", combination_type="cat")
