"""What is seen of a run while it trains: a bar on a terminal, a line now and then elsewhere."""

from collections.abc import Mapping, Sized
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Without a bar, about this many lines are printed over a whole run.
_LINES = 20


class ProgressDisplay(TrainerCallback):
    """Shows steps, losses and held-out figures; use as a context, so that an error leaves the terminal in order.

    Args:
        console: Where to show them.
        bar: Whether a moving bar may be drawn; none leaves it to the console.
    """

    def __init__(self, console: Console, bar: bool | None = None) -> None:
        self.console = console
        self._bar = console.is_terminal if bar is None else bar
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._next_line = 0.0
        self.moment: str | None = None
        """Of what the next held-out figures are; none names the epoch."""

    def __enter__(self) -> Self:
        if self._bar:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = self._evaluation = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._next_line = 0.0
        if state.global_step:
            self.console.print(f"Going on from step {state.global_step} of {state.max_steps}.")
        if self._progress is not None:
            self._training = self._progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, figures=""
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        figures = f"loss {logs['loss']:.4f}"
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, figures=figures)
        elif state.global_step >= self._next_line:
            self._next_line = state.global_step + state.max_steps / _LINES
            rate = f"  learning rate {logs['learning_rate']:.1e}" if "learning_rate" in logs else ""
            width = len(str(state.max_steps))
            self.console.print(f"step {state.global_step:{width}}/{state.max_steps}  {figures}{rate}", highlight=False)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._progress is None:
            return
        if self._evaluation is None:
            total = len(eval_dataloader) if isinstance(eval_dataloader, Sized) else None
            self._evaluation = self._progress.add_task("evaluating", total=total, figures="")
        self._progress.advance(self._evaluation)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
        self._evaluation = None
        epoch = f"after epoch {state.epoch:.3g}" if state.global_step and state.epoch is not None else "before training"
        when = self.moment or epoch
        self.console.print(f"held out, {when}: {describe(figures_of(metrics or {}))}", highlight=False)


def describe(metrics: Mapping[str, float]) -> str:
    """Figures of merit in one line.

    >>> describe({"loss": 0.43219, "macro_f1": 0.81})
    'loss 0.4322, macro f1 0.81'
    """
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in metrics.items())


def figures_of(logged: Mapping[str, Any]) -> dict[str, float]:
    """The figures of merit among a trainer's metrics, without their prefix.

    >>> figures_of({"eval_loss": 0.5, "eval_runtime": 3.2, "epoch": 1.0})
    {'loss': 0.5}
    """
    speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
    plain = {name.removeprefix("eval_"): value for name, value in logged.items()}
    return {name: float(value) for name, value in plain.items() if name not in speed}
