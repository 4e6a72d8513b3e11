"""What an adapter or a model is made of, without loading any weights.

An adapter is read from its configuration, the header of its tensor file, and the run's own files beside it; models
are the matter of `model_tree`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from veneer import files, legacy, units
from veneer.checkpoint import PREFIX, WEIGHTS_NAME
from veneer.commands.model_tree import ModelReport, inspect_model, ranges
from veneer.commands.nearest_tokens import Nearest, nearest_tokens
from veneer.config import CONFIG_NAME, PeftConfig
from veneer.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of an adapter file."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class AdapterReport:
    """What `veneer inspect` shows of an adapter.

    Args:
        folder: Where it lies.
        config: Its configuration.
        tensors: Its tensors, in the order of their names.
        file_bytes: Size of the tensor file.
        run: The run's resolved configuration; empty where the folder has none.
        results: The run's results; empty where the folder has none.
        nearest: Of a prompt, the tokens of the vocabulary that its virtual tokens are nearest to, or why that is not
            known.
    """

    folder: str
    config: PeftConfig
    tensors: list[TensorEntry]
    file_bytes: int
    run: Mapping[str, Any]
    results: Mapping[str, Any]
    nearest: Mapping[str, Nearest] | str

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "method": self.config.peft_type,
            "base": self.config.base_model_name_or_path,
            "config": self.config.to_dict(),
            "parameters": self.parameters,
            "bytes": self.file_bytes,
            "tensors": [dataclasses.asdict(tensor) for tensor in self.tensors],
            "run": dict(self.run),
            "before": self.results.get("before"),
            "after": self.results.get("after"),
            "nearest": self.nearest,
        }

    def __rich__(self) -> RenderableType:
        facts = Table.grid(padding=(0, 2))
        for name, value in self._facts().items():
            facts.add_row(Text(name, "dim"), Text(value))
        tensors = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        tensors.add_column("tensor", overflow="fold")
        for heading in ("shape", "type"):
            tensors.add_column(heading, no_wrap=True)
        for name, shape, dtype in fold_tensors(self.tensors):
            tensors.add_row(Text(name.removeprefix(PREFIX)), " x ".join(map(str, shape)) or "scalar", dtype)
        return Group(facts, "", tensors, *(["", self._nearest()] if self.nearest else []))

    def _nearest(self) -> RenderableType:
        """Virtual tokens in words."""
        if isinstance(self.nearest, str):
            return Text(self.nearest)
        words = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        words.add_column("virtual token", no_wrap=True)
        words.add_column("nearest tokens (cosine)", overflow="fold")
        for name, prompt in self.nearest.items():
            for number, tokens in enumerate(prompt):
                words.add_row(f"{name} {number}", Text(", ".join(f"{token} {cosine:.2f}" for token, cosine in tokens)))
        return words

    @property
    def base(self) -> str:
        """The base model's name: the one that a run was given, or that in the configuration."""
        return _base(self.run, self.config)

    def _facts(self) -> dict[str, str]:
        count = f"{units.count(self.parameters)} in {len(self.tensors)} tensors"
        facts = {
            "adapter": self.folder,
            "method": str(self.config.peft_type),
            "base model": self.base,
            "settings": ", ".join(f"{name}={value}" for name, value in _settings(self.config).items()) or "defaults",
            "parameters": count,
            "file": units.size(self.file_bytes),
        }
        data = self.run.get("data") or {}
        if data.get("train"):
            facts["trained on"] = f"{data['train']} ({self.run.get('task')})"
        before, after = self.results.get("before") or {}, self.results.get("after") or {}
        changes = [f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in after if name in before]
        if changes:
            facts["held out"] = ", ".join(changes)
        return facts


def inspect(
    what: str, method: str | None = None, target: str | None = None, task: str | None = None
) -> AdapterReport | ModelReport:
    """Look at an adapter folder, or at a model by name or folder.

    Args:
        what: An adapter's folder; else a model's folder, a hub id, or the name of a sample model.
        method: For a model: the method whose places and parameters are of interest.
        target: For a model: which modules; as `target_modules`, with commas between names.
        task: For a model: build it with the head for this task rather than as it was published.

    Raises:
        ConfigError: There is no such thing, or `method`, `target` or `task` were given for an adapter.
        TargetError: The target matches nothing.
    """
    if (Path(what) / CONFIG_NAME).is_file():
        given = [f"--{name}" for name, value in (("method", method), ("target", target), ("task", task)) if value]
        if given:
            raise ConfigError(f"{what} is an adapter; {' and '.join(given)} need a model. Name its base model instead.")
        return inspect_adapter(what)
    return inspect_model(what, method, target, task)


def inspect_adapter(folder: str) -> AdapterReport:
    """Read an adapter's files; of those in today's layout, without loading the tensors."""
    path = files.find(folder, WEIGHTS_NAME, required=False)
    if path.is_file():
        config, tensors = PeftConfig.from_pretrained(folder), _tensors(path)
    else:  # of another library: what its tensors are here is known when they have been read
        path = next((Path(folder) / name for name in legacy.OTHER_WEIGHTS if (Path(folder) / name).is_file()), path)
        config, read, _ = legacy.load(folder)
        tensors = [
            TensorEntry(name, tuple(read[name].shape), str(read[name].dtype).removeprefix("torch."))
            for name in sorted(read)
        ]
    run = _mapping(Path(folder) / "run.yaml")
    return AdapterReport(
        folder=folder,
        config=config,
        tensors=tensors,
        file_bytes=path.stat().st_size,
        run=run,
        results=_mapping(Path(folder) / "results.json"),
        nearest=nearest_tokens(path, config, _base(run, config)),
    )


def _base(run: Mapping[str, Any], config: PeftConfig) -> str:
    return str((run.get("model") or {}).get("name") or config.base_model_name_or_path)


def fold_tensors(tensors: list[TensorEntry]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Tensors that differ in one number of their names only, as one entry with a range.

    >>> entries = [TensorEntry(f"layer.{i}.up", (4, 2), "F32") for i in (0, 1, 2, 10)]
    >>> list(fold_tensors(entries))
    [('layer.0-2,10.up', (4, 2), 'F32')]
    """
    groups: dict[tuple[str, tuple[int, ...], str], list[tuple[int, ...]]] = {}
    for tensor in tensors:
        numbers = tuple(int(number) for number in re.findall(_NUMBER, tensor.name))
        groups.setdefault((re.sub(_NUMBER, "{}", tensor.name), tensor.shape, tensor.dtype), []).append(numbers)
    for (pattern, shape, dtype), rows in groups.items():
        columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
        # Ranges stand for every combination of their numbers, so they may only be used where all are there.
        if math.prod(map(len, columns)) == len(rows):
            yield pattern.format(*map(ranges, columns)), shape, dtype
        else:
            yield from ((pattern.format(*row), shape, dtype) for row in rows)


_NUMBER = r"(?<=\.)\d+(?=\.)"


def _tensors(path: Path) -> list[TensorEntry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            return [TensorEntry(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file ({error}). "
            "Copy or save the adapter again."
        ) from error


def _settings(config: PeftConfig) -> dict[str, Any]:
    """What the method was told, without what is empty or off as it is by default."""
    fresh = type(config)().to_dict()
    # Fields that the class does not explain are kept for `peft`'s files alone.
    explained = set(
        re.findall(r"^\s+(\w+):", "\n".join(cls.__doc__ or "" for cls in type(config).__mro__), re.MULTILINE)
    )
    own = explained - {entry.name for entry in dataclasses.fields(PeftConfig)}
    values = config.to_dict()
    if isinstance(targets := values.get("target_modules"), list):
        values["target_modules"] = [name for name, *_ in fold_tensors([TensorEntry(path, (), "") for path in targets])]
    return {name: value for name, value in values.items() if name in own and (value or value != fresh[name])}


def _mapping(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON file of the run; empty where there is none, for an adapter needs none."""
    if not path.is_file():
        return {}
    try:
        # JSON is YAML, but PyYAML reads 1e-05 as a text.
        text = path.read_text(encoding="utf-8")
        loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Remove it to look at the adapter alone.") from error
    return loaded if isinstance(loaded, dict) else {}
