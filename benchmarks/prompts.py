"""Prompts and prefixes against LoRA on two tasks and two models: what is reached, and with how many parameters.

A model and a task are one `veneer compare`, in a process of its own. What has finished is kept in `outputs/prompts`
until the whole table is there, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row, Spread, apart
from benchmarks.records import Record

ORDER = 68
QUESTION = "Do prompts and prefixes learn what LoRA learns?"

TASKS = {"sms-spam": "SMS spam", "movie-sentiment": "Movie sentiment"}
VIRTUAL = {"num_virtual_tokens": 16}
METHODS: dict[str, dict[str, Any]] = {
    "head": {"name": "head"},
    "prompt tuning": {"name": "prompt_tuning", **VIRTUAL, "prompt_tuning_init": "SAMPLE_VOCAB"},
    "P-tuning": {"name": "p_tuning", **VIRTUAL},
    "prefix tuning": {"name": "prefix_tuning", **VIRTUAL},
    "prefix tuning from a text": {"name": "prefix_tuning", **VIRTUAL, "init_text": "of the task"},
    "LoRA": {"name": "lora", "r": 8, "lora_alpha": 16},
}
# Where a method learns with another rate than its default alone.
RATES = {("minilm", "P-tuning"): 5e-3}
TEXTS = {
    "sms-spam": "This message is either spam or not spam. It was sent to a mobile phone. Here is the message",
    "movie-sentiment": "This movie review is either positive or negative. A film critic wrote it. Here is the review",
}
KEPT, PAGE = ROOT / "outputs" / "prompts", ROOT / "docs" / "prompts.md"


@dataclass(frozen=True)
class Sizes:
    """How much of the data a model sees.

    Args:
        train: Examples.
        held_out: Examples.
        batch: Examples a step.
        epochs: Of training.
    """

    train: int
    held_out: int
    batch: int
    epochs: int


MODELS = {"minilm": Sizes(2000, 1000, 16, 3), "smollm2": Sizes(200, 300, 8, 3)}
QUICK = Sizes(32, 32, 16, 1)


def run(quick: bool) -> Iterator[Row]:
    kept = KEPT.with_name("prompts-quick") if quick else KEPT
    for model, sizes in {"minilm": QUICK}.items() if quick else MODELS.items():
        for data in TASKS:
            folder = kept / f"{model}-{data}"
            named = {"folder": str(folder), "model": model, "data": data, "sizes": vars(sizes)}
            for name, found in apart("prompts", "compared", **named).value.items():
                yield Row(
                    f"{data}, {model}, {name}",
                    f"the most frequent class: {found['majority']:.3f}",
                    Spread.of([found["accuracy"]]),
                    "accuracy",
                    score={"trained": f"{found['trained']:,}", "before": f"{found['before']:.3f}"},
                )
    shutil.rmtree(kept, ignore_errors=True)


def compared(folder: str, model: str, data: str, sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """All methods on one model and one task; accuracy and parameters by the method's name."""
    from rich.console import Console

    from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
    from veneer.training.many import configurations, train_many

    options = RunOptions(
        task="classification",
        model=ModelOptions(model, dtype="float32"),
        data=DataOptions(data, max_length=64, limit=sizes["train"], validation_limit=sizes["held_out"]),
        training={
            "num_train_epochs": sizes["epochs"],
            "per_device_train_batch_size": sizes["batch"],
            "eval_strategy": "no",
            "save_strategy": "no",
        },
        output=OutputOptions(folder, resume=Path(folder).exists()),
    )
    methods = []
    for name, method in METHODS.items():
        text = {"init_text": TEXTS[data]} if "init_text" in method else {}
        rate = {"training": {"learning_rate": RATES[model, name]}} if (model, name) in RATES else {}
        methods.append({**method, **text, **rate})
    done = train_many(options, methods, console=Console(quiet=True))
    if done.failures:
        raise RuntimeError(str(done.failures))
    figures: dict[str, dict[str, Any]] = {}
    for name, configuration in zip(METHODS, configurations(options, methods), strict=True):
        result = done.results[configuration]
        figures[name] = {
            "accuracy": result.after["accuracy"],
            "before": result.before["accuracy"],
            "majority": result.majority,
            "trained": result.trained_parameters,
        }
    return figures


def draw(record: Record, page: Path = PAGE) -> None:
    """A line a method, a column a task and model, between the markers of the page."""
    cells: dict[str, dict[str, str]] = {}
    for row in record.rows:
        if found := re.fullmatch(r"([\w-]+), (\w+), (.+)", row.what):
            data, model, method = found.groups()
            shown = f"{row.figure.median:.3f} ({row.score['trained']})"
            cells.setdefault(method, {})[f"{TASKS[data]}, {model}"] = shown
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {m} | {' | '.join(line.get(column, '') for column in columns)} |" for m, line in cells.items()]
    start, end = "<!-- prompts -->", "<!-- end of prompts -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    page.write_text("\n".join([before + start, *lines, end + rest.partition(end)[2]]), encoding="utf-8")
