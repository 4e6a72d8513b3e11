"""Whole runs of the classification walkthrough, for what the steps of `classification` cannot tell: score and memory.

Each run is a process of its own: two epochs of 2,000 movie snippets, an evaluation and a checkpoint each epoch.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.classification import ARMS, EPOCHS, HELD_OUT, TRAIN, options_of, trainer_of
from benchmarks.harness import Apart, Row, Spread, apart

ORDER = 60
QUESTION = "How good is the classifier of the walkthrough, and how much memory does a whole run take?"

MEMORY = {"padded": 0.5, "longest": None}
# One for the arm that takes longest: for the same seed its batches are those of `longest`, with more padding.
SEEDS = {"veneer": (0, 1, 2), "longest": (0, 1, 2), "padded": (0,)}


def run(quick: bool) -> Iterator[Row]:
    limit = 64 if quick else TRAIN
    full = {
        arm: [
            apart("walkthrough", "whole", arm=arm, seed=seed, limit=limit) for seed in SEEDS[arm][: 1 if quick else 3]
        ]
        for arm in ARMS
    }
    memory = {arm: max(each.memory for each in runs) for arm, runs in full.items()}
    for arm, target in MEMORY.items():
        yield Row(
            f"whole run: {EPOCHS} epochs of {limit:,} examples, {HELD_OUT:,} held out",
            ARMS[arm],
            Spread.of([memory["veneer"] / memory[arm]]),
            "of the memory",
            target,
            True,
            memory={"Veneer": memory["veneer"], "peft": memory[arm]},
            score={"Veneer": _score(full["veneer"]), "peft": _score(full[arm])},
        )


def whole(arm: str, seed: int, limit: int) -> dict[str, float]:
    """One whole run; held-out accuracy and loss at its end."""
    with tempfile.TemporaryDirectory() as folder:
        if arm == "veneer":
            from rich.console import Console

            from veneer.training.run import train

            result = train(options_of(seed, folder, limit), console=Console(quiet=True))
            return {"accuracy": result.after["accuracy"], "loss": result.after["loss"]}
        import numpy as np

        def accuracy(prediction: Any) -> dict[str, float]:
            return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}

        trainer = trainer_of(arm, seed, folder, limit, epochs=EPOCHS, every="epoch", compute_metrics=accuracy)
        trainer.train()
        trainer.save_model(folder)
        found = trainer.evaluate()
        return {"accuracy": found["eval_accuracy"], "loss": found["eval_loss"]}


def _score(runs: Sequence[Apart]) -> str:
    """Mean accuracy and loss over the seeds, with the smallest and largest accuracy."""
    found = [each.value["accuracy"] for each in runs]
    seeds = f" ({min(found):.3f} to {max(found):.3f}, {len(found)} seeds)" if len(found) > 1 else " (1 seed)"
    return f"{statistics.mean(found):.3f}{seeds}, loss {statistics.mean(each.value['loss'] for each in runs):.3f}"
