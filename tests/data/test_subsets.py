"""Splits and limits: sizes, shares of the classes, and the same choice for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.subsets import allocate, hold_out, subset
from veneer.errors import DataError

classes = st.lists(st.sampled_from("abcd"), min_size=2, max_size=60)


@settings(deadline=None)
@given(classes, st.floats(0.01, 0.99), st.integers(0, 5))
def test_hold_out_is_a_partition_that_leaves_each_class(groups: list[str], share: float, seed: int) -> None:
    counts = Counter(groups)
    if max(counts.values()) == 1:
        with pytest.raises(DataError, match="no class has more than one"):
            hold_out(groups, share, seed)
        return
    train, held = hold_out(groups, share, seed)
    assert sorted(train + held) == list(range(len(groups)))
    assert train == sorted(train)
    assert held == sorted(held)
    assert {groups[row] for row in train} == set(groups)
    spare = len(groups) - len(counts)
    assert len(held) == min(max(1, round(len(groups) * share)), spare)
    assert (train, held) == hold_out(groups, share, seed)


def test_hold_out_keeps_the_shares() -> None:
    groups = ["a"] * 700 + ["b"] * 290 + ["c"] * 10
    _, held = hold_out(groups, 0.1, 0)
    assert Counter(groups[row] for row in held) == {"a": 70, "b": 29, "c": 1}
    assert hold_out(groups, 0.1, 1)[1] != held


def test_hold_out_nothing() -> None:
    assert hold_out(["a", "b"], 0, 0) == ([0, 1], [])


@settings(deadline=None)
@given(classes, st.integers(4, 60), st.integers(0, 5))
def test_subset_has_its_size_and_each_class(groups: list[str], limit: int, seed: int) -> None:
    chosen = subset(groups, limit, seed, each=1)
    assert len(chosen) == len(set(chosen)) == min(limit, len(groups))
    assert {groups[row] for row in chosen} == set(groups)
    assert chosen == sorted(chosen) == subset(groups, limit, seed, each=1)


def test_subset_of_all() -> None:
    assert subset(["a", "b"], None, 0) == subset(["a", "b"], 5, 0) == [0, 1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_allocate_is_within_bounds_and_near_the_share(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    counts = allocate(sizes, total, sizes)
    assert sum(counts) == total
    assert all(abs(count - size * total / sum(sizes)) < 1 for count, size in zip(counts, sizes, strict=True))
