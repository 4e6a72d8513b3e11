"""Several classifiers trained as `veneer compare` does it, on one base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.options import RunResult


@dataclass(frozen=True)
class Task:
    """A model, and how much of which data it sees.

    Args:
        model: A sample model.
        data: A sample.
        train: How many examples are trained on.
        held_out: How many are held out.
        epochs: How often.
        batch: Examples a step.
    """

    model: str
    data: str
    train: int
    held_out: int
    epochs: int
    batch: int


def compare(task: Task, methods: Sequence[Mapping[str, Any]], folder: str, **training: Any) -> list[RunResult | str]:
    """What each method came to, or why it failed; what has finished in the folder is not trained again."""
    from rich.console import Console

    from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
    from veneer.training.many import configurations, train_many

    options = RunOptions(
        task="classification",
        model=ModelOptions(task.model, dtype="float32"),
        data=DataOptions(task.data, max_length=64, limit=task.train, validation_limit=task.held_out),
        training={
            "num_train_epochs": task.epochs,
            "per_device_train_batch_size": task.batch,
            "eval_strategy": "no",
            "save_strategy": "no",
            **training,
        },
        output=OutputOptions(folder, resume=Path(folder).exists()),
    )
    done = train_many(options, methods, console=Console(quiet=True))
    return [done.results.get(name) or done.failures[name] for name in configurations(options, methods)]
