"""Prompts and prefixes against LoRA on two tasks and two models: what is reached, and with how many parameters.

A model and a task are one `veneer compare`, in a process of its own. What has finished is kept in `outputs/prompts`
until the whole table is there, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.comparisons import Task, compare
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


# By model: examples to train on and held out, epochs, examples a step.
SIZES = {"minilm": (2000, 1000, 3, 16), "smollm2": (200, 300, 3, 8)}
QUICK = {"minilm": (32, 32, 1, 16)}


def run(quick: bool) -> Iterator[Row]:
    kept = KEPT.with_name("prompts-quick") if quick else KEPT
    for model, sizes in (QUICK if quick else SIZES).items():
        for data in TASKS:
            named = {"folder": str(kept / f"{model}-{data}"), "task": asdict(Task(model, data, *sizes))}
            for name, found in apart("prompts", "compared", **named).value.items():
                yield Row(
                    f"{data}, {model}, {name}",
                    f"the most frequent class: {found['majority']:.3f}",
                    Spread.of([found["accuracy"]]),
                    "accuracy",
                    score={"trained": f"{found['trained']:,}", "before": f"{found['before']:.3f}"},
                )
    shutil.rmtree(kept, ignore_errors=True)


def compared(folder: str, task: dict[str, Any]) -> dict[str, dict[str, float]]:
    """All methods on one model and one task; accuracy and parameters by the method's name."""
    sizes = Task(**task)
    methods = []
    for name, method in METHODS.items():
        text = {"init_text": TEXTS[sizes.data]} if "init_text" in method else {}
        rate = {"training": {"learning_rate": RATES[sizes.model, name]}} if (sizes.model, name) in RATES else {}
        methods.append({**method, **text, **rate})
    figures: dict[str, dict[str, Any]] = {}
    for name, result in zip(METHODS, compare(sizes, methods, folder), strict=True):
        if isinstance(result, str):
            raise RuntimeError(f"{name}: {result}")
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
