"""`veneer select`: score the weights on real batches, choose, and write down what `veneer train` takes.

With rounds of refinement: train the choice briefly, evaluate, score the trained model, choose anew. Every round trains
from the start, so that what differs between two rounds is the choice alone.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from veneer import files, units
from veneer.config import ModuleConfig
from veneer.errors import ConfigError
from veneer.evaluation import figures
from veneer.evaluation.report import Section, score, write_report
from veneer.options import RunOptions, RunResult, SelectOptions
from veneer.selection import scores as criteria
from veneer.selection import settings
from veneer.selection.score_file import Scores, layer_and_name
from veneer.selection.score_file import score as score_model
from veneer.selection.settings import Chosen
from veneer.training import arguments
from veneer.training import folder as run_folder
from veneer.training.basis import Basis, load
from veneer.training.clock import peak_memory
from veneer.training.original import Original
from veneer.training.run import method_of, run_on

SELECTION = "selection.json"
SCORES = "scores.safetensors"
PICTURE = "scores.svg"
TRAIN = "train.yaml"
REPORT = "report.html"
_BATCH = 8


@dataclass
class Round:
    """One round of refinement.

    Attributes:
        number: From 1 on.
        chosen: What was trained.
        result: What it came to.
        kept: Which share of it the round before had chosen too; none in the first.
    """

    number: int
    chosen: Chosen
    result: RunResult
    kept: float | None

    @property
    def score(self) -> tuple[str, float]:
        name, value = score(self.result.after)
        return name, float("nan") if value is None else value


@dataclass
class Selection:
    """What `select` found.

    Attributes:
        folder: Where it was written.
        scores: By which the choice was made.
        chosen: The choice; of the best round, where there are several.
        config: File that `veneer train --config` takes.
        rounds: Those of refinement.
    """

    folder: str
    scores: Scores
    chosen: Chosen
    config: str
    rounds: list[Round] = field(default_factory=list)


def select(options: RunOptions, how: SelectOptions, *, console: Console | None = None) -> Selection:
    """Scores the weights of a model and chooses what of it a method trains.

    Writes `scores.safetensors`, `scores.svg`, `train.yaml` and `selection.json` into the output folder; with rounds of
    refinement also a folder for each round, and `report.html`.

    Args:
        options: The run that the choice is for; the training section is used by refinement, and handed on.
        how: How to score and to choose.
        console: Where to report; standard output if none.

    Raises:
        ConfigError, DataError, TargetError: An option or the data cannot be used, or the folder is taken.
        StateError: Scores are not numbers.
        UnsupportedError: matplotlib, which draws the picture, is not installed.
    """
    console = console or Console(highlight=False)
    config = method_of(options)
    criterion = settings.criterion_for(config, how.criterion)
    criteria.criterion_of(criterion)
    assert isinstance(config, ModuleConfig)
    settings.check(config, how)
    level = settings.level_for(config, how)
    arguments.check(options.training, options.output)
    figures.require()
    folder = claim(options)
    given = None if how.scores is None else Scores.load(how.scores)

    basis = load(options, console)
    if how.refine and basis.data.evaluation is None:
        raise ConfigError(
            "refine needs held-out data to judge the rounds by, and nothing is held out. Give data.validation, or "
            "raise data.validation_share above 0."
        )
    basis.original = Original(basis.base)
    for name in (REPORT, SELECTION):
        (folder / name).unlink(missing_ok=True)
    rounds: list[Round] = []
    path = folder / SCORES
    method = dict(run_folder.method_settings(options.method))
    for number in range(max(1, how.refine)):
        path = folder / (f"round-{number + 1}.safetensors" if how.refine else SCORES)
        found = given or _scored(basis, config, criterion, level, how, rounds, console)
        basis.original.restore()
        found.save(path)
        files.write_text(path.with_suffix(".svg"), picture(found))
        choice = settings.choose(basis.base, config, method, found, how, path)
        if how.refine:
            rounds.append(_train(basis, choice, how, folder, rounds, console))
    best = max(rounds, key=_goodness) if rounds else None
    if best is not None:
        source = folder / f"round-{best.number}.safetensors"
        choice, found = best.chosen, Scores.load(source)
        found.save(folder / SCORES)
        files.write_text(folder / PICTURE, picture(found))
        if choice.unit == "entries":
            choice = replace(choice, method={**choice.method, "scores": str((folder / SCORES).absolute())})
        write_report(
            [each.result for each in rounds], folder / REPORT, "Refinement of a selection", sections=_sections(rounds)
        )
    ready = replace(options, method=choice.method)
    _write(folder, ready, found, choice, rounds)
    return Selection(str(folder), found, choice, str(folder / TRAIN), rounds)


def claim(options: RunOptions) -> Path:
    """The output folder, if a selection may be written there. Nothing is changed yet.

    Raises:
        ConfigError: It holds something else, or another selection that may not be overwritten.
    """
    if options.output.resume:
        raise ConfigError("output.resume has no meaning for a selection: it is made anew. Remove it.")
    folder = Path(options.output.folder).expanduser()
    found = run_folder.entries(folder, options.output)
    if SELECTION in found and not options.output.overwrite:
        raise ConfigError(
            f"output.folder: {folder} already holds a selection. Name another folder, or set output.overwrite to "
            "replace it."
        )
    if found and not {SELECTION, SCORES, "round-1.safetensors"} & set(found):
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise ConfigError(
            f"output.folder: {folder} is not empty and holds no selection ({shown}). Name a new or empty folder; "
            "overwrite replaces selections only."
        )
    return folder


def _scored(
    basis: Basis,
    config: ModuleConfig,
    criterion: str,
    level: criteria.Level,
    how: SelectOptions,
    rounds: list[Round],
    console: Console,
) -> Scores:
    """Scores of the targets: of the base model, or of what the last round has trained."""
    model, above = basis.base, None
    if rounds:
        model, above = basis.reloaded(Path(rounds[-1].result.folder)), "default"
    elif torch.accelerator.is_available() and not getattr(model, "hf_device_map", None):
        model.to(torch.accelerator.current_accelerator())
    batches: list[Any] = []
    if criteria.needs_data(criterion):
        size = min(_BATCH, how.examples)
        batches = basis.batches(size, math.ceil(how.examples / size))
    start = time.perf_counter()
    with _progress(console, len(batches)) as seen:
        found = score_model(
            model,
            batches,
            criterion,
            level=level,
            target_modules=config.target_modules or _default(basis.base, config),
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
            task_type=config.task_type,
            above=above,
            seen=seen,
        )
    by = f"by {criterion}" + (f" over {len(batches)} batches" if batches else "")
    console.print(
        f"Scored {units.count(sum(found.sizes.values()))} entries of {len(found.sizes)} weights {by}: "
        f"{units.duration(time.perf_counter() - start)}, peak memory {units.size(peak_memory())}.",
        highlight=False,
        soft_wrap=True,
    )
    return found


def _default(root: nn.Module, config: ModuleConfig) -> Any:
    """What the method adapts where it is not told."""
    from veneer.targets import default_targets, walk

    return default_targets(config, root, dict(walk(root)))


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, a line now and then elsewhere; yields what is called after each batch."""
    done = 0
    bar = Progress(console=console) if console.is_terminal and total else None
    task = bar.add_task("scoring", total=total) if bar is not None else None

    def seen() -> None:
        nonlocal done
        done += 1
        if bar is not None and task is not None:
            bar.advance(task)
        elif done % max(1, total // 4) == 0:
            console.print(f"scored {done} of {total} batches", highlight=False)

    if bar is None:
        yield seen
        return
    with bar:
        yield seen


def _train(
    basis: Basis, chosen: Chosen, how: SelectOptions, folder: Path, rounds: list[Round], console: Console
) -> Round:
    """Trains a choice briefly, from the start, in a folder of its own."""
    number = len(rounds) + 1
    console.rule(f"round {number} of {how.refine}", characters="-", align="left")
    training = dict(basis.options.training)
    if "max_steps" not in training:
        training["num_train_epochs"] = how.round_epochs
    training.setdefault("save_strategy", "no")
    place = str(folder / f"round-{number}")
    run = replace(
        basis.options,
        method=chosen.method,
        training=training,
        output=replace(basis.options.output, folder=place, overwrite=True),
    )
    result = run_on(basis, run, run_folder.claim(run), console=console)
    assert basis.original is not None
    gc.collect()
    basis.original.restore()
    return Round(number, chosen, result, chosen.shared_with(rounds[-1].chosen) if rounds else None)


def _goodness(found: Round) -> float:
    name, value = found.score
    return -value if name == "loss" else value


def _write(folder: Path, options: RunOptions, scores: Scores, chosen: Chosen, rounds: list[Round]) -> None:
    """The configuration, and what was found; the latter last, as it marks the folder."""
    import yaml

    values = yaml.safe_load(run_folder.dump(run_folder.located(options)))
    del values["output"]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    files.write_text(folder / TRAIN, "# veneer train --config THIS_FILE --output FOLDER\n" + text)
    said = {
        "criterion": scores.criterion,
        "batches": scores.batches,
        "unit": chosen.unit,
        "modules": {
            path: {"score": value, chosen.unit: chosen.counts.get(path, 0)} for path, value in scores.modules().items()
        },
        "rounds": [
            {"round": each.number, "folder": each.result.folder, "after": each.result.after, "kept": each.kept}
            for each in rounds
        ],
    }
    files.write_text(folder / SELECTION, json.dumps(said, indent=2) + "\n")


def picture(scores: Scores) -> str:
    """The mean score of an entry, by layer and module, as SVG."""
    values: dict[tuple[str, str], float] = {}
    for path, value in scores.modules().items():
        layer, name = layer_and_name(path)
        values["-" if layer is None else str(layer), name] = value
    rows, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    return figures.heat_map(rows, columns, values, f"Mean {scores.criterion} score of an entry")


def table(found: Selection) -> Table:
    """Score and choice of each kind of module over its layers, and of each layer; fits a terminal of 80 columns."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", overflow="fold")
    for heading in ("weights", "entries", "mean score", found.chosen.unit):
        shown.add_column(heading, justify="right", no_wrap=True)
    importance = found.scores.modules()
    groups: dict[str, list[str]] = {}
    for by_layer in (False, True):
        for path in importance:
            layer, name = layer_and_name(path)
            key = (f"layer {layer}" if layer is not None else "outside layers") if by_layer else name
            groups.setdefault(key, []).append(path)
    for key, paths in groups.items():
        sizes = [found.scores.sizes[path] for path in paths]
        mean = sum(importance[p] * size for p, size in zip(paths, sizes, strict=True)) / sum(sizes)
        counts = [found.chosen.counts.get(path, 0) for path in paths]
        told = units.count(sum(counts))
        if found.chosen.unit == "rank":
            told = f"{min(counts)} to {max(counts)}"
        elif found.chosen.unit == "entries":
            told = f"{told} ({units.share(sum(counts), sum(sizes))})"
        shown.add_row(key, str(len(paths)), units.count(sum(sizes)), f"{mean:.3g}", told)
    return shown


def _sections(rounds: list[Round]) -> list[Section]:
    name = rounds[0].score[0]
    head = ("round", f"held-out {name}", "trained parameters", "chosen in the round before too", "training time")
    rows = [
        (
            str(each.number),
            f"{each.score[1]:.3f}",
            units.count(each.result.trained_parameters),
            "-" if each.kept is None else f"{each.kept:.0%}",
            units.duration(each.result.seconds),
        )
        for each in rounds
    ]
    text = "Each round scores the model as the round before has trained it, chooses, and trains from the start."
    pictures = [(Path(each.result.folder).with_suffix(".svg")).read_text(encoding="utf-8") for each in rounds]
    return [Section("Rounds", text, [head, *rows]), Section("Scores of each round", figures=pictures)]
