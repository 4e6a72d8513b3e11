"""The same methods on a language model that is ten times as large."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import tradeoff
from benchmarks.comparisons import Task
from benchmarks.harness import Row

ORDER = tradeoff.ORDER + 1
QUESTION = "And on a language model?"

TASK = Task("smollm2", "movie-sentiment", train=128, held_out=100, epochs=2, batch=4)


def run(quick: bool) -> Iterator[Row]:
    yield from tradeoff.of_model(TASK, quick)
