"""What a set of runs amounts to: a table for the terminal and one self-contained HTML page.

The page needs nothing but itself (figures are inline SVG, styles are inline, no script), so it can be mailed, archived
or opened years later. Everything that came from a model, a data set or a path is escaped by the template.
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table
from rich.text import Text

from veneer import __version__, files, units
from veneer.errors import UnsupportedError
from veneer.evaluation import figures
from veneer.options import RunResult

TASK_TITLES = {"classification": "Text classification", "causal-lm": "Language modelling"}


@dataclass(frozen=True)
class Run:
    """A result with what the table and the page show of it.

    Args:
        result: The result itself.
        label: The method, made unique among its neighbours by the folder where a method ran twice.
        score_name: `accuracy`, or `loss` where there are no classes.
        before: The score before training.
        after: The score after training.
        options: The resolved run configuration, empty where the folder has none.
    """

    result: RunResult
    label: str
    score_name: str
    before: float | None
    after: float | None
    options: Mapping[str, Any]

    @property
    def parameters(self) -> str:
        return units.count(self.result.trained_parameters)

    @property
    def share(self) -> str:
        return units.share(self.result.trained_parameters, self.result.total_parameters)

    @property
    def adapter(self) -> str:
        return units.size(self.result.adapter_bytes)

    @property
    def seconds(self) -> str:
        return units.duration(self.result.seconds)

    @property
    def memory(self) -> str:
        return units.size(self.result.peak_memory_bytes)

    @property
    def config_json(self) -> str:
        return json.dumps(self.result.config, indent=2, sort_keys=True, default=str)

    @property
    def options_yaml(self) -> str:
        return yaml.safe_dump(dict(self.options), sort_keys=False, allow_unicode=True) if self.options else ""


@dataclass(frozen=True)
class Group:
    """The runs of one task, which may be compared with each other."""

    title: str
    runs: list[Run]

    @property
    def score_name(self) -> str:
        return self.runs[0].score_name

    @property
    def majority(self) -> float | None:
        return self.runs[0].result.majority


@dataclass(frozen=True)
class Section:
    """What a page shows before the runs.

    Args:
        title: Heading.
        text: A paragraph.
        table: Rows of cells, the first of them the headings; empty for none.
        figures: SVG texts.
    """

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    figures: Sequence[str] = ()


def score(metrics: Mapping[str, float]) -> tuple[str, float | None]:
    """The figure that a run is judged by: accuracy where there are classes, else the loss.

    >>> score({"eval_loss": 0.7, "eval_accuracy": 0.53})
    ('accuracy', 0.53)
    >>> score({"loss": 2.5})
    ('loss', 2.5)
    """
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    name = "accuracy" if "accuracy" in plain else "loss"
    return name, plain.get(name)


def group_runs(results: Sequence[RunResult]) -> list[Group]:
    """Runs of the same task, model and data together, in the order of their first appearance."""
    sorted_out: dict[str, list[tuple[RunResult, Mapping[str, Any]]]] = {}
    for result in results:
        options = _options(result.folder)
        sorted_out.setdefault(_title(result, options), []).append((result, options))
    groups = []
    for title, members in sorted_out.items():
        methods = [result.method for result, _ in members]
        runs = []
        for result, options in members:
            name, after = score(result.after)
            label = result.method
            if methods.count(label) > 1:
                label = f"{label} ({Path(result.folder).name})"
            runs.append(Run(result, label, name, score(result.before)[1], after, options))
        groups.append(Group(title, runs))
    return groups


def summary_table(results: Sequence[RunResult]) -> Table:
    """The runs of each task in a table of their own, below each other; fits a terminal of 80 columns."""
    tables = Table.grid(padding=(0, 0, 1, 0))
    for group in group_runs(results):
        tables.add_row(_group_table(group))
    return tables


def _group_table(group: Group) -> Table:
    chance = "" if group.majority is None else f", majority class {group.majority:.3f}"
    # Text, not markup: a folder may be called "[bold]".
    title = Text.assemble((group.title, "bold"), f"\nheld-out {group.score_name}{chance}")
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold")
    for heading in ("before", "after", "trained", "share", "adapter", "time", "peak\nmemory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in group.runs:
        table.add_row(
            Text(run.label), _figure(run.before), Text(_figure(run.after), "bold"), run.parameters, run.share,
            run.adapter, run.seconds, run.memory,
        )  # fmt: skip
    return table


def write_report(
    results: Sequence[RunResult],
    path: str | Path,
    title: str,
    command: str | None = None,
    sections: Sequence[Section] = (),
) -> Path:
    """Write the page, atomically: at `path` there is the old file or the whole new one.

    Args:
        results: Finished runs; those of the same task, model and data are compared.
        path: The HTML file.
        title: Heading of the page.
        command: What produced the results; the present command line where none is given.
        sections: What stands before them.

    Raises:
        UnsupportedError: matplotlib or Jinja2 is not installed.
        CheckpointError: The file cannot be written.
    """
    groups = group_runs(results)
    palette = figures.colours([run.label for group in groups for run in group.runs])
    page = _template().render(
        title=title,
        sections=sections,
        groups=[_page_section(group, palette) for group in groups],
        palette=palette,
        figure=_figure,
        command=command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions=_versions(),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    target = Path(path)
    files.write_text(target, page)
    return target


def _page_section(group: Group, palette: Mapping[str, str]) -> dict[str, Any]:
    curves = [_curve(run) for run in group.runs]
    points = [
        figures.Point(run.label, run.result.trained_parameters, run.after)
        for run in group.runs
        if run.after is not None and run.result.trained_parameters > 0
    ]
    drawn = any(curve.loss or curve.held_out_loss for curve in curves)
    arguments = (palette, group.score_name, group.majority)
    return {
        "title": group.title,
        "score_name": group.score_name,
        "majority": group.majority,
        "runs": group.runs,
        "labels": group.runs[0].result.labels,
        "curves": figures.learning_curves(curves, *arguments) if drawn else "",
        # One point compares with nothing.
        "scatter": figures.score_against_parameters(points, *arguments) if len(points) > 1 else "",
        "examples": [(run.label, run.result.examples) for run in group.runs if run.result.examples],
    }


def _curve(run: Run) -> figures.Curve:
    before = {name.removeprefix("eval_"): value for name, value in run.result.before.items()}

    def logged(key: str, start: float | None = None) -> list[tuple[float, float]]:
        points = [(0.0, start)] if start is not None else []
        points += [(float(entry["epoch"]), float(entry[key])) for entry in run.result.history if key in entry]
        return list(dict(points).items())  # one value an epoch: a last evaluation may repeat the epoch's own

    scores = logged(f"eval_{run.score_name}", run.before) if run.score_name != "loss" else []
    if len(scores) == 1 and run.after is not None:
        # Measured before and after only: the line then joins the two.
        epochs = [float(entry["epoch"]) for entry in run.result.history if "epoch" in entry]
        scores.append((max(epochs, default=1.0), run.after))
    return figures.Curve(
        label=run.label,
        loss=logged("loss"),
        held_out_loss=logged("eval_loss", before.get("loss")),
        score=scores,
    )


def _title(result: RunResult, options: Mapping[str, Any]) -> str:
    task = options.get("task") or ("classification" if result.labels else "causal-lm")
    title = TASK_TITLES.get(task, task)
    model = (options.get("model") or {}).get("name") or result.config.get("base_model_name_or_path")
    data = (options.get("data") or {}).get("train")
    return f"{title}{f': {_short(data)}' if data else ''}{f' with {_short(model)}' if model else ''}"


def _short(name: str) -> str:
    """The last part of a local path; other people's folders are of no interest in a report."""
    return Path(name).name if os.path.isabs(name) else name


def _options(folder: str) -> Mapping[str, Any]:
    path = Path(folder) / "run.yaml"
    if not path.is_file():
        return {}
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _versions() -> dict[str, str]:
    versions = {"veneer": __version__, "Python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["system"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return versions


def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UnsupportedError(
            "The report needs Jinja2, which is not installed. Install it with: pip install 'veneer[report]'"
        ) from error
    environment = Environment(
        loader=PackageLoader("veneer", "evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja")
