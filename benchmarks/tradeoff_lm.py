"""The same methods on a language model that is ten times as large."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import tradeoff
from benchmarks.harness import Row

ORDER = tradeoff.ORDER + 1
QUESTION = "And on a language model?"


def run(quick: bool) -> Iterator[Row]:
    yield from tradeoff.of_model(tradeoff.Task("smollm2", 128, 100, 2, 4), quick)
