"""What importing costs. A command line that takes seconds to say its version is not used.

Every import happens in a fresh process, which times it itself: `import torch` first, then what comes on top.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.harness import CLOCK, Row, Spread, Times, now

ORDER = 10
QUESTION = "How long do imports and the command line take to start?"
TARGET = 0.2  # seconds more than torch
SIDES = {"Veneer": "veneer", "peft": "peft"}

MODEL_CLASS = "from transformers import AutoModelForSequenceClassification"
USE = "from {} import LoraConfig, PeftModel, get_peft_model"


def run(quick: bool) -> Iterator[Row]:
    pairs, warm_up = (2, 0) if quick else (7, 1)

    more = after("import torch", {"veneer": "import veneer", "peft": "import peft"}, pairs, warm_up)
    torch_seconds = statistics.median(more["before"])
    yield Row(
        "`import veneer`", f"`import torch` ({torch_seconds:.1f} s)", Spread.of(more["veneer"]), "s more", TARGET, True
    )
    yield Row("`import peft`", "`import torch`", Spread.of(more["peft"]), "s more")

    names = {name: USE.format(name) for name in ("veneer", "peft")}
    for what, first, target in (
        ("its classes", "import torch", TARGET),
        ("its classes, where transformers' model classes are imported too", f"import torch; {MODEL_CLASS}", None),
    ):
        more = after(first, names, pairs, warm_up)
        label = first.rpartition("; ")[2]
        yield Row(
            f"Veneer, {what}", f"`{label}`", Spread.of(more["veneer"]), "s more", target, True, more.seconds(**SIDES)
        )
        yield Row(f"`peft`, {what}", f"`{label}`", Spread.of(more["peft"]), "s more")

    trainers = {"veneer": "from veneer import Trainer", "peft": "from transformers import Trainer"}
    more = after(f"import torch; {MODEL_CLASS}", trainers, pairs, warm_up)
    yield Row("`veneer.Trainer`", "`transformers.Trainer`", more.ratio("veneer", "peft"), "times the time")

    whole = processes({"version": ["-m", "veneer", "--version"], "torch": ["-c", "import torch"]}, pairs, warm_up)
    yield Row(
        "`veneer --version`, the whole process",
        "`python -c 'import torch'`",
        whole.ratio("version", "torch"),
        "times the time",
        seconds=whole.seconds(Veneer="version", torch="torch"),
    )


def after(first: str, imports: dict[str, str], pairs: int, warm_up: int = 1) -> Times:
    """Seconds of each import once the `first` ones are done, in turns; those of the first ones as `before`."""
    times = Times({name: [] for name in [*imports, "before"]})
    for turn in range(warm_up + pairs):
        for name, statement in imports.items():
            clock = "time.process_time()" if os.environ.get(CLOCK) == "processor" else "time.perf_counter()"
            code = f"import time; a = {clock}; {first}; b = {clock}; {statement}; print(b - a, {clock} - b)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            before, more = map(float, done.stdout.split())
            if turn >= warm_up:
                times[name].append(more)
                times["before"].append(before)
    return times


def processes(commands: dict[str, list[str]], pairs: int, warm_up: int = 1) -> Times:
    """Seconds of whole processes of this Python, in turns."""
    times = Times({name: [] for name in commands})
    for turn in range(warm_up + pairs):
        for name, arguments in commands.items():
            start = _now_with_children()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            if turn >= warm_up:
                times[name].append(_now_with_children() - start)
    return times


def _now_with_children() -> float:
    if os.environ.get(CLOCK) != "processor":
        return now()
    spent = os.times()
    return spent.children_user + spent.children_system
