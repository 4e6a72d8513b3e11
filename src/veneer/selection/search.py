"""`veneer search`: the best method, rank, targets and learning rate by held-out score, with optuna.

A study lives in its storage, and the runs in `trials/` of the output folder. Whoever opens the same study goes on with
it: after an interruption, or beside other processes. What counts as done is a trial that was finished, pruned, or
refused for a reason; one that was cut off is not, and another takes its place.
"""

from __future__ import annotations

import gc
import json
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer import files
from veneer.errors import ConfigError, UnsupportedError, VeneerError
from veneer.evaluation import figures
from veneer.method_strings import parse_method
from veneer.options import RunOptions, SearchOptions
from veneer.registry import preset_of
from veneer.selection.trials import Found, score_name, told, written
from veneer.training import arguments, samplers
from veneer.training import folder as run_folder
from veneer.training.basis import Basis, load
from veneer.training.many import parts_of, refuse_spread
from veneer.training.original import Original
from veneer.training.run import method_of, run_on

if TYPE_CHECKING:
    from optuna import Study, Trial

SEARCH = "search.json"
STUDY = "study.journal"
TRIALS = "trials"
OWN_TARGETS = "the method's own"
_AROUND = 4.0  # the learning rate is searched from the method's own divided by this to it times this


def search(options: RunOptions, what: SearchOptions, *, console: Console | None = None) -> Found:
    """Trains configurations one after the other on one base model, each chosen by what the others came to.

    Args:
        options: What they have in common; its method is not used.
        what: What is searched.
        console: Where to report; standard output if none.

    Raises:
        ConfigError, DataError: A setting or the data cannot be used, nothing is held out, or the study is of other data
            or another model.
        UnsupportedError: optuna or matplotlib is not installed.
        VeneerError: No trial could be trained, or a method changed the base model itself.
    """
    console = console or Console(highlight=False)
    optuna = _optuna()
    figures.require()
    refuse_spread(options)
    check(options, what)
    folder = claim(options)
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(options, what, folder)
    basis = load(options, console)
    if basis.data.evaluation is None:
        raise ConfigError(
            "Nothing is held out to judge trials by. Give data.validation, or raise data.validation_share above 0."
        )
    files.write_text(folder / SEARCH, json.dumps(asdict(what), indent=2) + "\n")
    basis.original = Original(basis.base)
    before = done(study)
    if before:
        console.print(f"Going on with the study {what.study!r}: {before} of {what.trials} trials are done.")
    while (count := done(study)) < what.trials:
        trial = study.ask()
        state, value, said = optuna.trial.TrialState.FAIL, None, ""
        try:
            with samplers.generators_kept():
                value = _run(trial, basis, what, folder)
            state = optuna.trial.TrialState.COMPLETE
            said = f"{score_name(options)} {value:.4g}"
        except optuna.TrialPruned:
            state, said = optuna.trial.TrialState.PRUNED, "stopped: it fell behind"
        except Exception as error:  # whatever it was, others can still be trained
            if not isinstance(error, VeneerError):
                console.print(traceback.format_exc(), markup=False, soft_wrap=True)
            said = str(error) if isinstance(error, VeneerError) else repr(error)
            trial.set_user_attr("error", said)
            said = f"failed: {said}"
        finally:
            # The study first: it has to know of a trial that is interrupted.
            study.tell(trial, value, state)
            gc.collect()
            basis.original.restore()
        head = f"trial {trial.number} ({count + 1} of {what.trials}), {told(study.trials[trial.number])}"
        console.print(f"{head}: {said}", markup=False, soft_wrap=True)
    return written(study, options, folder)


def check(options: RunOptions, what: SearchOptions) -> None:
    """Refuses what cannot be searched.

    Raises:
        ConfigError: So.
    """
    if what.trials < 1:
        raise ConfigError(f"trials is {what.trials}. Expected at least 1.")
    if not what.methods:
        raise ConfigError("methods is empty. Name at least one method, for example 'lora'.")
    specs = [_spec(method) for method in what.methods]
    if twice := next((spec for spec in specs if specs.count(spec) > 1), None):
        raise ConfigError(f"methods: {twice} is given twice. Remove one.")
    for name in ("ranks", "densities", "reductions"):
        values = getattr(what, name)
        if not values or min(values) <= 0:
            raise ConfigError(f"{name} is {values}. Expected numbers above 0, one at least.")
    if max(what.densities) > 1:
        raise ConfigError(f"densities is {what.densities}. Expected shares of the entries, up to 1 (100%).")
    if what.rates is not None and not (len(what.rates) == 2 and 0 < what.rates[0] < what.rates[1]):
        raise ConfigError(f"rates is {what.rates}. Expected the lowest and the highest learning rate, above 0.")
    for method in what.methods:
        own, training = parts_of(method)
        method_of(replace(options, method=own))
        arguments.check({**options.training, **training}, options.output)


def claim(options: RunOptions) -> Path:
    """The output folder, if a search may write there. Nothing is changed yet.

    Raises:
        ConfigError: It holds something else.
    """
    folder = Path(options.output.folder).expanduser()
    found = run_folder.entries(folder, options.output)
    if found and not {SEARCH, STUDY} & set(found):
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise ConfigError(
            f"output.folder: {folder} is not empty and holds no search ({shown}). Name a new or empty folder, or "
            "that of a search to go on with."
        )
    return folder


def open_study(options: RunOptions, what: SearchOptions, folder: Path) -> Study:
    """The study: a new one, or the one that is there, if it asks the same question.

    Raises:
        ConfigError: It asks another, or the storage cannot be opened.
    """
    optuna = _optuna()
    where = what.storage or str(folder / STUDY)
    try:
        if "://" in where:
            storage: Any = optuna.storages.get_storage(where)
        else:  # a journal can be written by several machines at once, over network file systems too
            path = Path(where).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        if options.output.overwrite and what.study in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=what.study, storage=storage)
            shutil.rmtree(folder / TRIALS, ignore_errors=True)
        pruner: Any = optuna.pruners.MedianPruner() if what.prune else optuna.pruners.NopPruner()
        study = optuna.create_study(
            study_name=what.study,
            storage=storage,
            direction="minimize" if score_name(options) == "loss" else "maximize",
            # Processes that share a study must not all draw the same; alone, a seed makes it repeatable.
            sampler=optuna.samplers.TPESampler(seed=None if what.storage else int(options.training.get("seed", 42))),
            pruner=pruner,
            load_if_exists=True,
        )
    except (ValueError, OSError, ImportError, optuna.exceptions.OptunaError) as error:
        raise ConfigError(
            f"storage: {where} cannot be used for the study {what.study!r}: {error}. Name a file, or the URL of a "
            "database such as sqlite:///search.db."
        ) from error
    except Exception as error:  # of the database's own package
        if not type(error).__module__.startswith("sqlalchemy"):
            raise
        raise ConfigError(f"storage: {where} cannot be opened: {error}. Check the URL and the server.") from error
    question = _question(options)
    known = study.user_attrs.get("question")
    if known is None:
        study.set_user_attr("question", question)
    elif known != question:
        changed = [key for key in question if known.get(key) != question[key]]
        raise ConfigError(
            f"The study {what.study!r} in {where} is of another question: {', '.join(changed)} differ. Name another "
            "study, or set output.overwrite to begin it anew."
        )
    return study


def _question(options: RunOptions) -> dict[str, Any]:
    """What has to be the same for scores to be comparable, in JSON's types."""
    run = run_folder.located(options)
    training = {k: v for k, v in arguments.check(options.training, options.output).items() if k not in ("threads",)}
    asked = {"task": run.task, "model": asdict(run.model), "data": asdict(run.data), "training": training}
    return json.loads(json.dumps(asked, default=str))


def _run(trial: Trial, basis: Basis, what: SearchOptions, folder: Path) -> float:
    """Trains one configuration; its held-out score."""
    method, training = suggest(trial, basis.options, what)
    trial.set_user_attr("method", method)
    trial.set_user_attr("training", training)
    common = {"save_strategy": "no", **basis.options.training}
    place = folder / TRIALS / f"{trial.number:04}"
    run = replace(
        basis.options,
        method=method,
        training={**common, **training},
        output=replace(basis.options.output, folder=str(place), overwrite=True, resume=False),
    )
    name = score_name(run)
    callbacks = [_Reports(trial, name)]
    result = run_on(basis, run, run_folder.claim(run), callbacks=callbacks, console=Console(quiet=True))
    trial.set_user_attr("parameters", result.trained_parameters)
    trial.set_user_attr("seconds", round(result.seconds, 2))
    trial.set_user_attr("folder", str(place.absolute()))
    return result.after[name]


def suggest(trial: Trial, options: RunOptions, what: SearchOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method and the training settings of its own, chosen by the study where they are not given."""
    specs = {_spec(method): method for method in what.methods}
    spec = trial.suggest_categorical("method", list(specs))
    method, training = parts_of(specs[spec])
    cls, preset = preset_of(method["name"])
    known = {entry.name for entry in fields(cls)}
    given = {**preset, **method}
    for setting, choices in (("r", what.ranks), ("density", what.densities), ("reduction", what.reductions)):
        counted = setting == "density" and ("count" in given or "threshold" in given)
        if setting in known and setting not in method and not counted:
            method[setting] = trial.suggest_categorical(f"{spec}: {setting}", choices)
    # Methods on all kinds of linear layers; others have places of their own.
    default = getattr(cls, "default_targets", None)
    free = default in ((), ("all-linear",)) and "linear" in cls.adapter.kinds
    places = [OWN_TARGETS, *(targets for targets in what.targets if (targets,) != default)]
    if free and len(places) > 1 and "target_modules" not in given:
        targets = trial.suggest_categorical(f"{spec}: target_modules", places)
        if targets != OWN_TARGETS:
            method["target_modules"] = _targets(targets)
    if "learning_rate" not in {**options.training, **training}:
        own = parse_method(method).learning_rates[options.task]
        low, high = what.rates or (own / _AROUND, own * _AROUND)
        rate = trial.suggest_float(f"{spec}: learning_rate", low, high, log=True)
        training["learning_rate"] = float(f"{rate:.3g}")
    return method, training


def _targets(text: str) -> Any:
    """Names with commas between as a list; a word or an expression as it is."""
    from veneer.targets import is_shorthand

    return text if is_shorthand(text) or not text.replace(",", "").replace("_", "").isalnum() else text.split(",")


class _Reports(TrainerCallback):
    """Tells the study of every evaluation, and stops the trial if the study says so."""

    def __init__(self, trial: Trial, name: str) -> None:
        self.trial = trial
        self.name = name
        self.last = 0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step <= self.last or state.global_step >= state.max_steps:
            return  # before training, or the end: nothing is left to be saved
        self.last = state.global_step
        self.trial.report(float((metrics or {})[f"eval_{self.name}"]), state.global_step)
        if self.trial.should_prune():
            raise _optuna().TrialPruned


def done(study: Study) -> int:
    """How many trials were finished, pruned or refused, and not only cut off."""
    states = ("COMPLETE", "PRUNED")
    return sum(trial.state.name in states or "error" in trial.user_attrs for trial in study.trials)


def _spec(method: str | Mapping[str, Any]) -> str:
    """A method as text."""
    return method if isinstance(method, str) else json.dumps(dict(method), sort_keys=True)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UnsupportedError(
            "The search needs optuna, which is not installed. Install it with: pip install 'veneer[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
