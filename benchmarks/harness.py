"""Measuring: jobs in turns in one process, and memory in a process of its own.

Seconds on a shared machine mean little, and those of two runs cannot be compared. What is reported is the ratio of two
jobs that were run one after the other, the median of at least five such pairs, with the smallest and the largest.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

CLOCK = "BENCHMARKS_CLOCK"
"""Variable that says what is counted: `wall` or `processor`; child processes find it in their environment too."""


def now() -> float:
    """Seconds on the clock that is counted by: the wall's, or this process's time on the processor."""
    return time.process_time() if os.environ.get(CLOCK) == "processor" else time.perf_counter()


@dataclass(frozen=True)
class Job:
    """Something to be timed.

    Args:
        run: What is timed.
        after: Called with its result and not timed; takes back what `run` did.
    """

    run: Callable[[], Any]
    after: Callable[[Any], Any] = lambda result: None


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some figures.

    Args:
        median: The middle one.
        low: The smallest.
        high: The largest.
        count: How many there were.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        return cls(statistics.median(figures), min(figures), max(figures), len(figures))


@dataclass(frozen=True)
class Row:
    """One answer, a line of the table.

    Args:
        what: What was done.
        peer: What it is compared with.
        figure: The answer.
        unit: `times as fast` (time of the peer / time of Veneer), `times the time` (the other way round), `s more`,
            `ms`, or another; decides how the figure is shown.
        target: What is aimed at; none where there is no aim.
        at_most: Whether the target is an upper bound.
        seconds: Median seconds of each side. For a rough idea: only the figure compares.
        memory: Peak memory in bytes of each side.
        score: What each side reached.
    """

    what: str
    peer: str
    figure: Spread
    unit: str = "times as fast"
    target: float | None = None
    at_most: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    score: Mapping[str, str] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; none where there is no target."""
        if self.target is None:
            return None
        return self.figure.median <= self.target if self.at_most else self.figure.median >= self.target

    def to_dict(self) -> dict[str, Any]:
        """As it is recorded, with four significant digits."""
        return _rounded({**asdict(self), "reached": self.reached})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        values = {key: value for key, value in values.items() if key != "reached"}
        return cls(**{**values, "figure": Spread(**values["figure"])})


class Times(dict[str, list[float]]):
    """Seconds of each job, by its name; the same place in two lists is one pair."""

    def ratio(self, top: str, bottom: str) -> Spread:
        """The time of one job over that of another, pair by pair."""
        return Spread.of([a / b for a, b in zip(self[top], self[bottom], strict=True)])

    def difference(self, more: str, less: str) -> Spread:
        """The time of one job less that of another, pair by pair."""
        return Spread.of([a - b for a, b in zip(self[more], self[less], strict=True)])

    def seconds(self, **names: str) -> dict[str, float]:
        """Median seconds of jobs, under the names that the keywords give them."""
        return {shown: statistics.median(self[name]) for shown, name in names.items()}


def in_turns(jobs: Mapping[str, Job | Callable[[], Any]], pairs: int = 5, warm_up: int = 1) -> Times:
    """Runs the jobs in turns (A B A B ...) and times each.

    Args:
        jobs: By name.
        pairs: How often each is timed.
        warm_up: How often each is run before, untimed.
    """
    times = Times({name: [] for name in jobs})
    for turn in range(warm_up + pairs):
        for name, job in jobs.items():
            job = job if isinstance(job, Job) else Job(job)
            gc.collect()  # nobody pays for what another one left behind
            start = now()
            result = job.run()
            seconds = now() - start
            job.after(result)
            del result
            if turn >= warm_up:
                times[name].append(seconds)
    return times


@dataclass(frozen=True)
class Apart:
    """What a function gave in a process of its own.

    Args:
        value: What it returned.
        memory: The process's high-water mark of resident memory, in bytes.
    """

    value: Any
    memory: int


def apart(module: str, function: str, /, *, variables: Mapping[str, str | None] | None = None, **named: Any) -> Apart:
    """Runs `benchmarks.<module>.<function>(**named)` in a process of its own; arguments and result are JSON.

    Args:
        module: The benchmark.
        function: In it.
        variables: Changes of the environment; none as a value removes the variable.
        named: Arguments.

    Raises:
        RuntimeError: The process failed; with the end of what it said.
    """
    environment = dict(os.environ)
    for name, value in (variables or {}).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.child", str(answer), module, function, json.dumps(named)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"{module}.{function}({named}) ended with status {done.returncode}:\n{done.stderr[-3000:]}"
            )
        return Apart(**json.loads(answer.read_text(encoding="utf-8")))


def peak_memory() -> int:
    """High-water mark of this process's resident memory in bytes; 0 where it is not known.

    Linux's own figure is asked for first: that of `getrusage` also counts the process that this one was started from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return value
