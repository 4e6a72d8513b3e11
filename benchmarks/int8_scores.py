"""Whole runs on an int8 base against the same runs in float32: two tasks, three seeds, what is held out at every look.

A run is `veneer train` as it comes, in a process of its own. Both arms have the same seeds, so the same head, adapter,
and order of examples.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import pages
from benchmarks.harness import Row, Spread, apart
from benchmarks.int8 import ARMS
from benchmarks.records import Record

ORDER = 67
QUESTION = "Does an int8 base cost anything of the final score?"

TASKS = {"movie-sentiment": "Movie sentiment", "sms-spam": "SMS spam"}
MODEL, TRAIN, HELD_OUT, LOOKS, SEEDS = "minilm", 2000, 1000, 8, (0, 1, 2)


def run(quick: bool) -> Iterator[Row]:
    limit, held_out, seeds = (64, 64, SEEDS[:1]) if quick else (TRAIN, HELD_OUT, SEEDS)
    for data in TASKS:
        last: dict[str, list[float]] = {}
        for arm in ARMS:
            named = {"data": data, "arm": arm, "limit": limit, "held_out": held_out}
            runs = [apart("int8_scores", "whole", seed=seed, **named).value for seed in seeds]
            for step in runs[0]:
                found = Spread.of([accuracies[step] for accuracies in runs])
                yield Row(f"{data}, {arm}, after {step} steps", f"{len(seeds)} seeds", found, "accuracy")
            last[arm] = [list(accuracies.values())[-1] for accuracies in runs]
        differences = [after - before for after, before in zip(last["int8"], last["float32"], strict=True)]
        apart_by = max(last["float32"]) - min(last["float32"])
        yield Row(
            f"{data}, final accuracy, int8 less float32, seed by seed",
            f"float32: {statistics.mean(last['float32']):.3f}, its seeds {apart_by:.3f} apart",
            Spread.of(differences),
            "more",
        )


def whole(data: str, arm: str, seed: int, limit: int, held_out: int) -> dict[str, float]:
    """One run; held-out accuracy by step."""
    from rich.console import Console

    from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
    from veneer.training.run import train

    batch, epochs = 16, 2
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "learning_rate": 1e-3,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch,
            "seed": seed,
            "eval_strategy": "steps",
            "eval_steps": max(1, limit // batch * epochs // LOOKS),
            "save_strategy": "no",
        }
        result = train(
            RunOptions(
                task="classification",
                model=ModelOptions(MODEL, dtype="float32", quantize=ARMS[arm]),  # type: ignore[arg-type]
                data=DataOptions(data, max_length=128, limit=limit, validation_limit=held_out),
                method="lora:r=8,lora_alpha=16,target_modules=[query,value]",
                training=options,
                output=OutputOptions(folder, overwrite=True),
            ),
            console=Console(quiet=True),
        )
    return {str(entry["step"]): entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry}


def draw(record: Record) -> None:
    """Held-out accuracy over steps, the median of the seeds; one figure a task."""
    for data, title in TASKS.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for row in record.rows:
            if found := re.fullmatch(rf"{data}, (\w+), after (\d+) steps", row.what):
                series.setdefault(found[1], []).append((float(found[2]), row.figure.median))
        pages.lines_plot(pages.FIGURES / f"int8-{data}.svg", series, "step", "accuracy", title)
