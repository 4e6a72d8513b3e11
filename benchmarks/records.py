"""What is kept of a run: one line of JSON in `results/`, with all that is needed to judge it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import CLOCK, ROOT, Row

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("veneer", "torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "numpy")
# They decide how often fresh memory is asked for, which is much of the time of a training step (allocator.py).
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
RAISED = dict.fromkeys(ALLOCATOR, str(2**30))


@dataclass(frozen=True)
class Record:
    """One run of one benchmark.

    Args:
        benchmark: Its name.
        date: When it ended, UTC.
        command: What runs it again.
        commit: Of Veneer; with `+` where files differed from it.
        machine: Processor, cores, memory, operating system, accelerator, and the load when the run began.
        versions: Of Python and the packages that matter.
        settings: Threads, the clock that was counted by, and the allocator's variables where they are set.
        rows: The answers.
    """

    benchmark: str
    date: str
    command: str
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[Row]


def record(benchmark: str, rows: Sequence[Row], load: float | None, options: str = "") -> Record:
    """The record of a run that has just ended.

    Args:
        benchmark: Its name.
        rows: What it answered.
        load: The machine's load average before it began.
        options: Those of the command line.
    """
    import torch

    return Record(
        benchmark=benchmark,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        command=f"python -m benchmarks {benchmark}{options}",
        commit=commit(),
        machine={**machine(), "load": load},
        versions={"python": platform.python_version(), **_versions()},
        settings={
            "threads": torch.get_num_threads(),
            "clock": os.environ.get(CLOCK, "wall"),
            **allocator(),
        },
        rows=list(rows),
    )


def append(entry: Record, folder: Path = RESULTS) -> Path:
    """Adds the record to the benchmark's file."""
    values = {**vars(entry), "rows": [row.to_dict() for row in entry.rows]}
    path = folder / f"{entry.benchmark}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
    return path


def latest(benchmark: str, folder: Path = RESULTS) -> Record | None:
    """The last record of a benchmark; none if it has not been run."""
    path = folder / f"{benchmark}.jsonl"
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return Record(**{**values, "rows": [Row.from_dict(row) for row in values["rows"]]})


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "vector": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def load_average() -> float | None:
    """How many processes wanted the processor in the last minute; none where the system does not say."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def commit() -> str:
    """Short hash of the checked-out commit, with `+` if files differ from it; empty outside a checkout."""
    try:
        hash_ = _git("rev-parse", "--short", "HEAD")
        # Results and the page about them change with every run, and nothing depends on them.
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{hash_}+" if changed else hash_


def allocator() -> dict[str, str]:
    """The allocator's variables that are set."""
    return {name: os.environ[name] for name in ALLOCATOR if name in os.environ}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    import psutil

    return round(psutil.virtual_memory().total / 2**30)
