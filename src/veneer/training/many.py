"""Several methods trained one after the other on one frozen base model, which is loaded once.

`comparison.json` in the output folder is written when all settings have been checked, and again after each
configuration; it marks the folder as a comparison. Each configuration has a folder of its own in it, which is that of a
run like any other.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from veneer.errors import CheckpointError, ConfigError, VeneerError
from veneer.files import write_text
from veneer.method_strings import parse_method, read_method
from veneer.options import RunOptions, RunResult
from veneer.training import arguments, checkpoints, samplers
from veneer.training import folder as run_folder
from veneer.training.basis import as_begun, load
from veneer.training.original import Original
from veneer.training.run import method_of, run_on

COMPARISON = "comparison.json"
# What decides about the data, the new head, the device or the whole process is the same for all.
_COMMON = frozenset(
    {
        "seed", "threads", "use_cpu", "full_determinism", "tf32", "torch_compile", "torch_compile_backend",
        "torch_compile_mode", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config",
    }
)  # fmt: skip
_SPREAD = ("deepspeed", "fsdp", "parallelism_config")
_LONGEST = 80
"""Characters of a folder's name."""


@dataclass
class Comparison:
    """What the configurations came to.

    Attributes:
        folder: The output folder.
        results: By the name of the configuration, of those that have finished.
        failures: Of the others, why.
    """

    folder: str
    results: dict[str, RunResult] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def train_many(
    options: RunOptions, methods: Sequence[str | Mapping[str, Any]], *, console: Console | None = None
) -> Comparison:
    """Trains each method as `train` would, on one base model.

    Model and data are loaded, quantised and measured once. Between two configurations the base is made what it was, and
    what the last one needed is freed, so that the peak of memory is that of the largest. Each starts from the same
    state of the random generators, and ends in the weights that it would have reached alone.

    Args:
        options: What they have in common; its method is not used. Each configuration goes into a folder of its own
            within the output folder. With `output.resume`, those that have not finished are gone on with.
        methods: Method strings or mappings. Settings of `training` for one of them alone stand among its own:
            `lora:r=8,training.learning_rate=1e-3`, or `{"name": "lora", "r": 8, "training": {"learning_rate": 1e-3}}`.
        console: Where to report; standard output if none.

    Returns:
        Results and failures; a configuration that fails does not stop the others.

    Raises:
        ConfigError, DataError: A setting, the model or the data cannot be used; nothing was written.
        CheckpointError: There is nothing to resume.
        VeneerError: A method changed the base model itself, so that no other can be trained on it.
    """
    console = console or Console(highlight=False)
    refuse_spread(options)
    runs = configurations(options, methods)
    folder = Path(options.output.folder).expanduser()
    replaced = _claim(folder, options)
    if options.output.resume:
        runs = {name: _as_left(run) for name, run in runs.items()}
    done = Comparison(str(folder))
    for name, run in runs.items():
        if options.output.resume and (Path(run.output.folder) / run_folder.RESULTS).is_file():
            done.results[name] = run_folder.read_result(run.output.folder)
        elif name not in replaced:
            run_folder.claim(run)
    left = {name: run for name, run in runs.items() if name not in done.results}
    if not left:
        return done

    # Who goes on takes over what was measured and quantised when they began.
    begun = [run for run in runs.values() if (Path(run.output.folder) / run_folder.RUN).is_file()]
    first = options
    if options.output.resume and begun:
        first = replace(options, output=replace(begun[0].output, resume=True, overwrite=False))
    basis = load(as_begun(first), console)
    common = basis.options
    basis.original = Original(basis.base)
    for name in replaced:
        shutil.rmtree(folder / name)
    _write(folder, runs, done)
    for i, (name, run) in enumerate(left.items(), start=1):
        console.rule(f"{i} of {len(left)}: {name}", characters="-", align="left")
        settled = {"threads": common.training["threads"]}
        run = replace(run, model=common.model, training={**run.training, **settled})
        with samplers.generators_kept():
            try:
                done.results[name] = run_on(basis, run, Path(run.output.folder), console=console)
            except Exception as error:  # whatever it was, the others can still be trained
                if not isinstance(error, VeneerError):
                    console.print(traceback.format_exc(), markup=False, soft_wrap=True)
                done.failures[name] = str(error) if isinstance(error, VeneerError) else repr(error)
                console.print(f"{name} failed: {done.failures[name]}", markup=False, soft_wrap=True)
        try:
            gc.collect()
            basis.original.restore()
        except VeneerError as error:
            done.results.pop(name, None)
            done.failures[name] = str(error)
            (Path(run.output.folder) / run_folder.RESULTS).unlink(missing_ok=True)
            raise
        finally:
            _write(folder, runs, done)
    return done


def configurations(options: RunOptions, methods: Sequence[str | Mapping[str, Any]]) -> dict[str, RunOptions]:
    """A run for each method, by the name of its folder.

    Args:
        options: What they have in common.
        methods: As for `train_many`.

    Raises:
        ConfigError: There is none, one is given twice, or has settings that cannot be its own.
    """
    if not methods:
        raise ConfigError("methods is empty. Name at least one method, for example 'lora:r=8'.")
    arguments.check(options.training, options.output)
    runs: dict[str, RunOptions] = {}
    known: dict[str, str] = {}
    for given in methods:
        method, training = parts_of(given)
        if common := sorted(_COMMON & training.keys()):
            raise ConfigError(
                f"methods: {given!r} sets training.{common[0]}, which is the same for all configurations. Set it in "
                "the training section, or train the method alone."
            )
        own = arguments.check(training, options.output)
        run = replace(options, method=method, training={**options.training, **own})
        config = method_of(run)
        told = repr((config.to_dict(), arguments.check(run.training, options.output)))
        if told in known:
            raise ConfigError(
                f"methods: {given!r} and {known[told]!r} are the same configuration. Remove one, or change a setting."
            )
        known[told] = str(given)
        name = _name(method, own)
        if name.casefold() in {other.casefold() for other in runs}:
            name = f"{name}-{_digest(repr(given))}"
        place = str(Path(options.output.folder).expanduser() / name)
        runs[name] = replace(run, output=replace(options.output, folder=place))
    return runs


def parts_of(given: str | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method without the training settings among its own, and these."""
    name, values = read_method(given)
    training = values.pop("training", None) or {}
    if not isinstance(training, Mapping):
        raise ConfigError(f"methods: training of {given!r} is {training!r}. Expected a mapping of training settings.")
    dotted = {key: values.pop(key) for key in list(values) if key.startswith("training.")}
    settings = {**training, **{key.removeprefix("training."): value for key, value in dotted.items()}}
    parse_method({"name": name, **values})
    return {"name": name, **values}, settings


def _name(method: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """A folder's name that tells the settings.

    >>> _name({"name": "lora", "r": 8, "target_modules": ["query", "value"]}, {"learning_rate": 1e-3})
    'lora-r=8-target_modules=query+value-learning_rate=0.001'
    """
    settings = {**{key: value for key, value in method.items() if key != "name"}, **training}
    shown = [f"{key}={_shown(value)}" for key, value in settings.items()]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join([method["name"], *shown]))
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 7]}-{_digest(name)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def refuse_spread(options: RunOptions) -> None:
    """Refuses runs of several processes.

    Raises:
        ConfigError: So.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    named = next((name for name in _SPREAD if options.training.get(name)), None)
    if processes > 1 or named is not None:
        what = f"training.{named} is set" if named is not None else f"there are {processes} processes"
        raise ConfigError(
            f"{what}, but a model that is spread over processes cannot be given back as it was for the next "
            "configuration. Start one process without it, or train the methods one by one (veneer train)."
        )


def _claim(folder: Path, options: RunOptions) -> list[str]:
    """Whether the comparison may write into the folder; nothing is changed yet.

    Returns:
        The folders in it that give way.

    Raises:
        ConfigError: It holds something else, or another comparison that neither overwrite nor resume allows for.
        CheckpointError: There is nothing to resume.
    """
    output = options.output
    entries = run_folder.entries(folder, output)
    if COMPARISON in entries:
        if not (output.overwrite or output.resume):
            raise ConfigError(
                f"output.folder: {folder} already holds a comparison. Name another folder, set output.resume to go on "
                "with it, or output.overwrite to replace it."
            )
        earlier = _read(folder)
        return [name for name in earlier if (folder / name / run_folder.RUN).is_file()] if output.overwrite else []
    if output.resume:
        raise CheckpointError(
            f"output.resume: {folder} holds no comparison to go on with ({COMPARISON} is missing). Remove resume to "
            "start one, or name the folder of the comparison."
        )
    if entries:
        shown = ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "")
        raise ConfigError(
            f"output.folder: {folder} is not empty and holds no comparison ({shown}). Name a new or empty folder; "
            "overwrite replaces comparisons only."
        )
    return []


def _as_left(run: RunOptions) -> RunOptions:
    """A configuration of a comparison that goes on: from its last checkpoint, or anew where there is none.

    Raises:
        ConfigError: Its folder holds a run with other settings.
    """
    folder = Path(run.output.folder)
    begun = (folder / run_folder.RUN).is_file()
    if begun:
        run = as_begun(run)
        run_folder.compare(run_folder.read_options(folder), run, folder)
    saved = begun and any(checkpoints.defect(checkpoint) is None for _, checkpoint in checkpoints.steps(folder))
    return replace(run, output=replace(run.output, resume=saved, overwrite=begun and not saved))


def _write(folder: Path, runs: Mapping[str, RunOptions], done: Comparison) -> None:
    """Says what has become of each configuration."""
    values = {}
    for name, run in runs.items():
        values[name] = {
            "state": "finished" if name in done.results else "failed" if name in done.failures else "not finished",
            "method": run_folder.method_settings(run.method),
            "training": run.training,
        }
        if (result := done.results.get(name)) is not None:
            values[name] |= {
                key: getattr(result, key)
                for key in ("before", "after", "trained_parameters", "adapter_bytes", "seconds")
            }
        if name in done.failures:
            values[name]["error"] = done.failures[name]
    write_text(folder / COMPARISON, json.dumps({"configurations": values}, indent=2) + "\n")


def _read(folder: Path) -> dict[str, Any]:
    """The configurations that a comparison had, by name.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / COMPARISON
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["configurations"]
        return {name: values for name, values in found.items() if Path(name).name == name}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}). Restore it, or name another folder.") from error
