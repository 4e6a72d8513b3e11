"""What a run costs: time in the training loop, and memory."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """Adds up the time spent in the training loop without evaluations, across resumed runs too.

    Args:
        seconds: Time that is already on the clock.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._since: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run goes on counting."""
        running = time.perf_counter() - self._since if self._since is not None else 0.0
        return {"args": {"seconds": self.seconds + running}, "attributes": {}}

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Holds the clock, if it runs."""
        running = self._since is not None
        self._stop()
        try:
            yield
        finally:
            if running:
                self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None


def peak_memory() -> int:
    """High-water mark of the process's resident memory in bytes, since the process began; 0 where it is not known.

    It covers all that the process did so far: for a figure of one run, run it in a process of its own.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
