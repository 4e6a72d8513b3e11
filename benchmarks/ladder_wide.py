"""The ladder at a width at which matrices have a larger share of the time: two layers of 2,048 with random weights."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import ladder
from benchmarks.harness import Row

ORDER = ladder.ORDER + 1
QUESTION = "And at a larger width?"


def run(quick: bool) -> Iterator[Row]:
    yield from ladder.of_width("two random layers of width 2,048", False, quick)
