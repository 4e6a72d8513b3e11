"""What a search came to: the best configuration, a table, and a page with the trade-off of score and size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich import box
from rich.table import Table

from veneer import files, units
from veneer.errors import VeneerError
from veneer.evaluation import figures
from veneer.evaluation.report import Section, score, write_report
from veneer.options import RunOptions
from veneer.training import folder as run_folder

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

BEST = "best.yaml"
REPORT = "report.html"
_SHOWN = 10
_HEAD = ("trial", "configuration", "score", "trained", "time")


@dataclass
class Found:
    """What a search came to.

    Attributes:
        study: The study, all trials of all processes in it.
        score_name: By what trials are judged.
        config: File that `veneer train --config` takes.
        report: The page.
    """

    study: Any
    score_name: str
    config: str
    report: str


def written(study: Study, options: RunOptions, folder: Path) -> Found:
    """Writes the best configuration and the report.

    Raises:
        VeneerError: No trial was finished.
    """
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not complete:
        errors = [trial.user_attrs["error"] for trial in study.trials if "error" in trial.user_attrs]
        raise VeneerError(f"No trial could be trained. The first said: {errors[0] if errors else 'nothing'}")
    best = study.best_trial
    run = replace(
        options, method=best.user_attrs["method"], training={**options.training, **best.user_attrs["training"]}
    )
    values = yaml.safe_load(run_folder.dump(run_folder.located(run)))
    del values["output"]
    head = f"# The best of {len(study.trials)} trials. veneer train --config THIS_FILE --output FOLDER\n"
    files.write_text(folder / BEST, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    name, larger = score_name(options), score_name(options) != "loss"
    points = [figures.Point(told(trial), trial.user_attrs["parameters"], float(trial.value or 0)) for trial in complete]
    ranked = _ranked(study)
    own = [Path(trial.user_attrs["folder"]) for trial in ranked if trial.state.name == "COMPLETE"][:_SHOWN]
    results = [run_folder.read_result(place) for place in own if (place / run_folder.RESULTS).is_file()]
    report = write_report(
        results,
        folder / REPORT,
        "Search",
        sections=[
            Section(
                "Score against size",
                f"{len(study.trials)} trials. Joined: those that no other beats with as few parameters.",
                figures=[figures.trade_off(points, name, larger_is_better=larger)],
            ),
            Section("Trials, best first", table=[_HEAD, *(_cells(trial) for trial in ranked)]),
        ],
    )
    return Found(study, name, str(folder / BEST), str(report))


def table(found: Found) -> Table:
    """The best trials; fits a terminal of 80 columns."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"held-out {found.score_name}", title_justify="left")
    for i, heading in enumerate(_HEAD):
        shown.add_column(heading, justify="left" if i == 1 else "right", overflow="fold", no_wrap=i != 1)
    for trial in _ranked(found.study)[:_SHOWN]:
        shown.add_row(*_cells(trial))
    return shown


def _cells(trial: FrozenTrial) -> tuple[str, ...]:
    known = trial.user_attrs
    value = f"{trial.value:.4f}" if trial.value is not None else "-"
    return (
        str(trial.number),
        told(trial) + ("" if trial.state.name == "COMPLETE" else f" ({known.get('error', trial.state.name.lower())})"),
        value,
        units.count(known["parameters"]) if "parameters" in known else "-",
        units.duration(known["seconds"]) if "seconds" in known else "-",
    )


def _ranked(study: Study) -> list[FrozenTrial]:
    """Finished trials, best first, then the others."""
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    others = [trial for trial in study.trials if trial.state.name in ("PRUNED", "FAIL")]
    return [*sorted(finished, key=lambda trial: sign * float(trial.value or 0)), *others]


def told(trial: FrozenTrial) -> str:
    """A configuration in a line."""
    method = trial.user_attrs.get("method", {})
    settings = {**{k: v for k, v in method.items() if k != "name"}, **trial.user_attrs.get("training", {})}
    return f"{method.get('name', '?')} " + ", ".join(
        f"{key}={'+'.join(value) if isinstance(value, list) else value}" for key, value in settings.items()
    )


def score_name(options: RunOptions) -> str:
    """The figure that trials are judged by."""
    return score({"loss": 0.0, "accuracy": 0.0} if options.task == "classification" else {"loss": 0.0})[0]
