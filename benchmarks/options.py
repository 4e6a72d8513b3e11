"""What the options that trade time for memory, or a wait for time, do to a training step.

Each is measured in a process of its own, in turns with a run without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.harness import Row, Times, apart

ORDER = 66
QUESTION = "What do gradient checkpointing and compiled blocks bring and cost?"
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient checkpointing": {"activation_checkpointing": True},
    "gradient checkpointing, reentrant": {
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "compiled blocks": {"compile_blocks": True},
}  # fmt: skip


def run(quick: bool) -> Iterator[Row]:
    pairs, steps = (1, 2) if quick else (5, 4)
    model, method, rows, length = "smollm2", "lora:r=8,target_modules=all-linear", 8, 128
    if quick:
        model, method, rows, length = "minilm", "lora", 4, 16
    for what, training in list(OPTIONS.items())[: 1 if quick else None]:
        times, memory = Times({"with": [], "without": []}), {"with": 0, "without": 0}
        for _ in range(pairs):
            for name, given in (("with", training), ("without", {})):
                job = {"model": model, "method": method, "rows": rows, "length": length, "training": given}
                done = apart("estimate", "train", steps=steps, **job)
                times[name].append(done.value)
                memory[name] = max(memory[name], done.memory)
        yield Row(
            f"{what}; a step of {model}, {method}, {rows} x {length} tokens",
            "the same without",
            times.ratio("with", "without"),
            "times the time",
            seconds=times.seconds(**{"with": "with", "without": "without"}),
            memory=memory,
        )
