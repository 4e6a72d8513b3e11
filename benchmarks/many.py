"""Eight configurations of LoRA on the classification walkthrough: one process with one base against eight processes.

The peer is the usual shell loop: a process for each configuration, which starts Python, loads data and model, trains
with peft and transformers' `Trainer` (padded to the longest of the batch), and evaluates before, after each epoch and
saves as `veneer train` does. Time is that of a whole process from its start to its end, those of the peer one after the
other and added up. Memory is Veneer's one process against the eight at once, as one runs them side by side: the sum of
their peaks. A third arm, a process of `train` for each, tells what one base alone gains.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import classification
from benchmarks.harness import CLOCK, Apart, Row, Spread, apart

ORDER = 88
QUESTION = "What does it save to tune eight configurations on one base?"

CONFIGURATIONS: list[dict[str, Any]] = [
    {"r": r, "targets": targets, "rate": rate}
    for r in (4, 16)
    for targets in (["query", "value"], ["query", "key", "value"])
    for rate in (5e-4, 1e-3)
]
ARMS = {"loop": "peft + Trainer, a process each", "alone": "veneer train, a process each"}


@dataclass(frozen=True)
class _Whole:
    seconds: float
    memory: int
    accuracies: list[float]

    @property
    def score(self) -> str:
        return f"{statistics.mean(self.accuracies):.3f} (mean of {len(self.accuracies)})"


def run(quick: bool) -> Iterator[Row]:
    chosen, limit, held, turns = (CONFIGURATIONS[:2], 32, 32, 1) if quick else (CONFIGURATIONS, 400, 200, 3)
    runs: dict[str, list[_Whole]] = {"together": [], **{arm: [] for arm in ARMS}}
    for _ in range(turns):
        runs["together"].append(_added([_timed("together", configurations=chosen, limit=limit, held=held)]))
        for arm in ARMS:
            each = [_timed(arm, configurations=[one], limit=limit, held=held) for one in chosen]
            runs[arm].append(_added(each))
    ours = runs["together"]
    for arm, peer in ARMS.items():
        theirs = runs[arm]
        shown = {"Veneer": ours, "the peer": theirs}
        what = f"{len(chosen)} configurations, {classification.EPOCHS} epochs of {limit} examples"
        yield Row(
            f"{what}: whole processes, one after the other",
            peer,
            Spread.of([b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]),
            target=1.5 if arm == "loop" else None,
            seconds={name: statistics.median(one.seconds for one in given) for name, given in shown.items()},
            score={name: given[0].score for name, given in shown.items()},
        )
        yield Row(
            f"{what}: one process against {len(chosen)} at once",
            peer,
            Spread.of([a.memory / b.memory for a, b in zip(ours, theirs, strict=True)]),
            "of the memory",
            0.25 if arm == "loop" else None,
            True,
            memory={name: max(one.memory for one in given) for name, given in shown.items()},
        )


def together(configurations: list[dict[str, Any]], limit: int, held: int) -> list[float]:
    """All on one base; their accuracies."""
    from rich.console import Console

    from veneer.training.many import train_many

    methods = [
        {"name": "lora", "r": one["r"], "target_modules": one["targets"], "training": {"learning_rate": one["rate"]}}
        for one in configurations
    ]
    with tempfile.TemporaryDirectory() as folder:
        done = train_many(_options(folder, limit, held), methods, console=Console(quiet=True))
        return [result.after["accuracy"] for result in done.results.values()]


def alone(configurations: list[dict[str, Any]], limit: int, held: int) -> list[float]:
    """One as `veneer train` does it; its accuracy."""
    from rich.console import Console

    from veneer.training.run import train

    (one,) = configurations
    with tempfile.TemporaryDirectory() as folder:
        options = _options(folder, limit, held)
        options.method = {"name": "lora", "r": one["r"], "target_modules": one["targets"]}
        options.training["learning_rate"] = one["rate"]
        return [train(options, console=Console(quiet=True)).after["accuracy"]]


def loop(configurations: list[dict[str, Any]], limit: int, held: int) -> list[float]:
    """One with peft and transformers; its accuracy."""
    import numpy as np
    import peft
    import transformers
    from transformers import AutoTokenizer

    from veneer.data import load_task
    from veneer.samples import model_folder

    (one,) = configurations
    with tempfile.TemporaryDirectory() as folder:
        options = _options(folder, limit, held)
        tokenizer = AutoTokenizer.from_pretrained(model_folder(classification.MODEL))
        data = load_task(options.data, options.task, tokenizer, 0)
        lora = {**classification.LORA, "r": one["r"], "target_modules": one["targets"]}
        model = peft.get_peft_model(classification._base(0), peft.LoraConfig(**lora))

        def accuracy(prediction: Any) -> dict[str, float]:
            return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}

        settings = transformers.TrainingArguments(
            folder, learning_rate=one["rate"], num_train_epochs=classification.EPOCHS, seed=0, warmup_steps=0.1,
            per_device_train_batch_size=classification.BATCH, per_device_eval_batch_size=32, eval_strategy="epoch",
            save_strategy="epoch", save_total_limit=2, logging_steps=0.02, report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model,
            settings,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            train_dataset=classification._tokenized(data.train, tokenizer, {}),
            eval_dataset=classification._tokenized(data.evaluation, tokenizer, {}),
            compute_metrics=accuracy,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.evaluate()
        trainer.train()
        trainer.save_model(folder)
        found: float = trainer.evaluate()["eval_accuracy"]
        return [found]


def _options(folder: str, limit: int, held: int) -> Any:
    options = classification.options_of(0, folder, limit)
    options.data.validation_limit = held
    options.output.overwrite = False
    options.model.dtype = "float32"
    options.training["threads"] = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return options


def _timed(arm: str, **named: Any) -> tuple[float, Apart]:
    """Seconds of a process of its own from start to end, by the clock that is counted by."""
    start = _now()
    done = apart("many", arm, **named)
    return _now() - start, done


def _now() -> float:
    if os.environ.get(CLOCK) != "processor":
        return time.perf_counter()
    spent = os.times()  # of the processes that have been waited for
    return spent.children_user + spent.children_system


def _added(parts: list[tuple[float, Apart]]) -> _Whole:
    accuracies = [accuracy for _, done in parts for accuracy in done.value]
    return _Whole(sum(seconds for seconds, _ in parts), sum(done.memory for _, done in parts), accuracies)
