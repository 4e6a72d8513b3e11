"""The output folder of a run: who may write into it, what is in it, and how a run is read back.

`run.yaml` is written first and marks the folder as a run; `results.json` is written last and marks the run as finished.
Between them lie the adapter's two files, the tokenizer, and `checkpoint-N` folders.
"""

import copy
import dataclasses
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from veneer import __version__
from veneer.config import PeftConfig
from veneer.errors import CheckpointError, ConfigError, VeneerWarning
from veneer.files import sync_folder, write_text
from veneer.method_strings import parse_method
from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions, RunResult
from veneer.quantization import Quantization
from veneer.training import arguments, checkpoints

RUN = "run.yaml"
RESULTS = "results.json"
QUANTIZATION = "quantization.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def entries(folder: Path, output: OutputOptions) -> list[str]:
    """Names of what is in the output folder; nothing where it does not exist yet.

    Raises:
        ConfigError: It is a file, or the run is to start anew and to go on at once.
    """
    if output.overwrite and output.resume:
        raise ConfigError(
            "output.overwrite and output.resume are both set: one starts anew, the other goes on. Choose."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output.folder: {folder} is a file. Name a folder.")
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def claim(options: RunOptions) -> Path:
    """The output folder, if this run may write there. Nothing is changed yet.

    Raises:
        ConfigError: It holds something else, or another run that neither overwrite nor resume allows for.
        CheckpointError: There is nothing to resume.
    """
    output = options.output
    folder = Path(output.folder).expanduser()
    found = entries(folder, output)
    if output.resume:
        if RUN not in found:
            raise CheckpointError(
                f"output.resume: {folder} holds no run to go on with ({RUN} is missing). Remove resume to start one, "
                "or name the folder of the run."
            )
        compare(read_options(folder), options, folder)
        checkpoints.clean(folder)
        checkpoints.last_complete(folder)
    elif RUN in found and not output.overwrite:
        raise ConfigError(
            f"output.folder: {folder} already holds a run. Name another folder, set output.resume to go on with it, "
            "or output.overwrite to replace it."
        )
    elif found and RUN not in found:
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise ConfigError(
            f"output.folder: {folder} is not empty and holds no run of Veneer's ({shown}). Name a new or empty folder; "
            "overwrite replaces runs only."
        )
    return folder


def begin(folder: Path, options: RunOptions, *, resume: bool) -> None:
    """Makes the folder this run's: clears away an earlier run unless it goes on, and writes the configuration."""
    if not resume and folder.is_dir():
        # The marks first: a folder that is killed here is an unfinished run, not one with foreign results.
        for name in (RESULTS, QUANTIZATION, *_ADAPTER):
            (folder / name).unlink(missing_ok=True)
        checkpoints.clean(folder)
        for _, checkpoint in checkpoints.steps(folder):
            checkpoints.remove(checkpoint)
    write_text(folder / RUN, _header() + dump(options))


def publish(folder: Path, fill: Callable[[Path], RunResult], prompting: Mapping[str, Any]) -> RunResult:
    """Has `fill` write the adapter and what belongs to it aside, checks included, then puts the files in place.

    Args:
        folder: The output folder.
        fill: Writes into the folder it is given, and returns what the run came to.
        prompting: For `read_prompting`; empty for classification.

    Raises:
        CheckpointError: They could not be written; what was in the folder is intact.
    """
    with checkpoints.aside(folder / "final") as partial:
        result = fill(partial)
        values = dataclasses.asdict(result) | ({"prompting": dict(prompting)} if prompting else {})
        (partial / RESULTS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        checkpoints.sync(partial)
        # The results last: they say that all the rest is there.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == RESULTS):
            target = folder / path.name
            if path.is_dir() and target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        sync_folder(folder)
        partial.rmdir()
    return result


def read_options(folder: str | Path) -> RunOptions:
    """The resolved configuration of the run in a folder.

    Raises:
        CheckpointError: There is none, or it is not a run's configuration.
    """
    path = Path(folder).expanduser() / RUN
    if not path.is_file():
        raise CheckpointError(f"{folder} is not the output folder of a run: it has no {RUN}. Name such a folder.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunOptions)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        # A copy, for it reads text once more: the training section's "no" would become false.
        given = parser.parse_object(copy.deepcopy(values)).as_dict()
    except (yaml.YAMLError, ArgumentError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a run's configuration ({error}). Restore it, or train again.") from error
    return RunOptions(
        task=given["task"],
        model=ModelOptions(**given["model"]),
        data=DataOptions(**given["data"]),
        output=OutputOptions(**given["output"]),
        method=values.get("method", given["method"]),
        training=dict(values.get("training") or {}),
    )


def read_result(folder: str | Path) -> RunResult:
    """The results of the finished run in a folder.

    Raises:
        CheckpointError: The run is not finished, or the file is damaged.
    """
    path = Path(folder).expanduser() / RESULTS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds a run that has not finished: it has no {RESULTS}. Go on with it (output.resume), or "
            "name the folder of a finished run."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return RunResult(**{entry.name: values[entry.name] for entry in dataclasses.fields(RunResult)})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}). Restore it, or train again.") from error


def read_prompting(folder: str | Path) -> dict[str, Any]:
    """How a language model's prompts were written: `separator`, and `template` where it was the chat template."""
    values = json.loads((Path(folder).expanduser() / RESULTS).read_text(encoding="utf-8"))
    return {"separator": "", "template": True} | values.get("prompting", {})


def write_quantization(folder: Path, quantization: Quantization) -> None:
    """Says which layers of the base model were quantised, for `read_quantization`."""
    (folder / QUANTIZATION).write_text(json.dumps(quantization.to_dict(), indent=1) + "\n", encoding="utf-8")


def read_quantization(folder: Path) -> Quantization:
    """What the base model of the run in a folder was given for.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = folder / QUANTIZATION
    try:
        return Quantization.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}). It says which layers were quantised. Restore it, or train again."
        ) from error


def dump(options: RunOptions) -> str:
    """The configuration as YAML that `veneer train --config` takes."""
    values = dataclasses.asdict(options)
    values["output"] |= {"overwrite": False, "resume": False}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def located(options: RunOptions) -> RunOptions:
    """The same run with local files and folders by their absolute paths, so that it can be read from anywhere."""
    from veneer.samples import is_sample

    def absolute(name: str | None) -> str | None:
        if name is None or is_sample(name) or not Path(name).expanduser().exists():
            return name
        return str(Path(name).expanduser().absolute())

    return dataclasses.replace(
        options,
        model=dataclasses.replace(options.model, name=str(absolute(options.model.name))),
        data=dataclasses.replace(
            options.data, train=str(absolute(options.data.train)), validation=absolute(options.data.validation)
        ),
        output=dataclasses.replace(options.output, folder=str(Path(options.output.folder).expanduser().absolute())),
    )


def method_settings(method: str | Mapping[str, Any]) -> dict[str, Any]:
    """A method as a mapping with everything that it leaves to defaults, which another version may set otherwise."""
    config = parse_method(method)
    name = method.partition(":")[0] if isinstance(method, str) else method["name"]
    bookkeeping = {entry.name for entry in dataclasses.fields(PeftConfig)}
    settings = {
        entry.name: value
        for entry in dataclasses.fields(config)
        if entry.name not in bookkeeping and "planned" not in entry.metadata
        if (value := config.to_dict().get(entry.name)) is not None  # some are left out where they say nothing
    }
    return {"name": name, **settings}


def compare(before: RunOptions, now: RunOptions, folder: Path) -> None:
    """Refuses to go on with other data, another model or method; says so if anything else has changed.

    Only what the present run sets is compared: defaults were resolved into what was written.

    Raises:
        ConfigError: So.
    """
    old, new = dataclasses.asdict(before), dataclasses.asdict(located(now))
    new["training"] = arguments.check(now.training, now.output)
    changed: dict[str, tuple[Any, Any]] = {}
    if before.task != now.task:
        changed["task"] = (before.task, now.task)
    if parse_method(before.method).to_dict() != parse_method(now.method).to_dict():
        changed["method"] = (before.method, now.method)
    for section in ("model", "data", "training", "output"):
        for name, value in new[section].items():
            if old[section].get(name) != value and (section != "output" or name == "early_stopping_patience"):
                changed[f"{section}.{name}"] = (old[section].get(name), value)
    essential = {
        key: pair for key, pair in changed.items() if key in ("task", "method", "model.name") or key.startswith("data.")
    }
    if essential:
        raise ConfigError(
            f"output.resume: {folder} holds another run: {_changes(essential)}. Give the settings in its {RUN}, "
            "or start a new run in another folder."
        )
    if changed:
        warnings.warn(
            f"{folder} was begun with other settings: {_changes(changed)}. The run goes on with the new ones, and will "
            "not end in the weights of one that had the same settings throughout.",
            VeneerWarning,
            stacklevel=4,
        )


def _changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} was {old!r} and is now {new!r}" for key, (old, new) in changed.items())


def _header() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"# Written by Veneer {__version__} ({packages}, Python {platform.python_version()}).\n"
        "# To repeat the run: veneer train --config THIS_FILE --output.folder ANOTHER_FOLDER\n"
    )
