"""Choosing by scores: thresholds, counts, neurons, and ranks within a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from veneer.errors import ConfigError
from veneer.methods.sparse import SparseConfig, chosen
from veneer.selection.choice import ranks

SCORES = {"a": torch.tensor([[1.0, 5.0, 2.0], [0.0, 3.0, 9.0]]), "b": torch.tensor([[4.0, 0.5], [6.0, 0.1]])}


def picked(**settings: Any) -> dict[str, list[int]]:
    config = SparseConfig(**{"criterion": "fisher", **settings})
    return {path: positions.tolist() for path, positions in chosen(SCORES, config).items()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"threshold": 4.0}, {"a": [1, 5], "b": [0, 2]}),
        ({"threshold": 9.0}, {"a": [5], "b": []}),
        ({"count": 3, "scope": "model"}, {"a": [1, 5], "b": [2]}),
        ({"density": 0.5}, {"a": [1, 4, 5], "b": [0, 2]}),
        ({"count": 1, "scope": "neuron"}, {"a": [1, 5], "b": [0, 2]}),
        # Rows sum to 8 and 12, and to 4.5 and 6.1.
        ({"count": 1, "unit": "neuron"}, {"a": [3, 4, 5], "b": [2, 3]}),
        ({"count": 2, "unit": "neuron", "scope": "model"}, {"a": [0, 1, 2, 3, 4, 5], "b": []}),
        ({"threshold": 6.0, "unit": "neuron"}, {"a": [0, 1, 2, 3, 4, 5], "b": [2, 3]}),
    ],
)
def test_what_is_chosen(settings: dict[str, Any], expected: dict[str, list[int]]) -> None:
    assert picked(**settings) == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"count": 5}, "count=5, but b has 4 entries, so that is more than 100%"),
        ({"count": 11, "scope": "model"}, "all layers together has 10 entries"),
        ({"count": 3, "scope": "neuron"}, "a row of b has 2 entries"),
        ({"count": 3, "unit": "neuron"}, "a has 2 neurons"),
        ({"threshold": 10.0}, r"threshold=10\.0 leaves no entry at all"),
        ({"threshold": 1.0, "count": 2}, "both say how many"),
        ({"unit": "neuron", "scope": "neuron"}, "a neuron out of one"),
        ({"density": 1.01}, r"density=1\.01; a share"),
        ({"density": 0.1}, "leaves no entry of a layer"),
    ],
)
def test_choices_that_cannot_be_made(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        picked(**settings)


COSTS = {"a": 10, "b": 10, "c": 20}


def given(importance: dict[str, float], budget: int = 160, low: int = 1, high: int = 16) -> dict[str, int]:
    return ranks(importance, COSTS, budget, low, lambda path: high)


def test_ranks_follow_importance_within_the_budget() -> None:
    assert given({"a": 1.0, "b": 1.0, "c": 1.0}) == {"a": 4, "b": 4, "c": 4}
    assert given({"a": 4.0, "b": 2.0, "c": 1.0}) == {"a": 8, "b": 4, "c": 2}
    assert given({"a": 1.0, "b": 0.0, "c": 0.0}) == {"a": 13, "b": 1, "c": 1}
    assert given({"a": 1.0, "b": 0.0, "c": 0.0}, low=0, budget=120) == {"a": 12, "b": 0, "c": 0}
    assert given({"a": 9.0, "b": 1.0, "c": 1.0}, high=6) == {"a": 6, "b": 4, "c": 3}
    for importance in ({"a": 9.0, "b": 1.0, "c": 1.0}, {"a": 0.3, "b": 0.29, "c": 1e-9}):
        found = given(importance, high=6)
        spent = sum(COSTS[path] * rank for path, rank in found.items())
        assert all(1 <= rank <= 6 for rank in found.values())
        assert 160 - 10 < spent <= 160  # no rank more fits anywhere


@pytest.mark.parametrize(
    ("importance", "how", "says"),
    [
        ({"a": -1.0, "b": 1.0, "c": 1.0}, {}, r"that of a is -1\.0"),
        ({"a": 1.0, "b": float("nan"), "c": 1.0}, {}, "that of b is nan"),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, {}, "all of them are zero"),
        (
            {"a": 1.0, "b": 1.0, "c": 1.0},
            {"budget": 30},
            "take 40 to 640 parameters in these layers",
        ),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {"budget": 641}, "take 40 to 640"),
    ],
)
def test_ranks_that_cannot_be_given(importance: dict[str, float], how: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        given(importance, **how)
