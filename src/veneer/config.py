"""Configurations of methods, and their JSON file.

A method is a dataclass derived from `PeftConfig` whose `adapter` names the class that carries it out. Registering it
(`registry.py`) makes it loadable from files (`peft_type`) and from strings (`"lora:r=16"`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from veneer import field_types, files
from veneer.errors import CheckpointError, ConfigError, VeneerWarning, nearest
from veneer.registry import config_class

if TYPE_CHECKING:
    from torch import nn

    from veneer.adapter import Adapter

CONFIG_NAME = "adapter_config.json"

# The version of the file format that is written: what `peft` expects to find in `peft_version`.
PEFT_FORMAT = "0.21.2"


class TaskType(StrEnum):
    """What the adapted model is for. Decides the class of the wrapped model and which head is trained."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def planned(default: Any, what: str) -> Any:
    """A field of `peft`'s files that can be read, but of which only the default is carried out in this version."""
    make = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata={"planned": what})


def own(default: Any) -> Any:
    """A field that `peft`'s class of the method has not: written to files only where it says more than the default."""
    return field(default=default, metadata={"own": True})


@dataclass(frozen=True)
class Nested:
    """Settings that stand together in one field of a configuration.

    Raises:
        ConfigError: A value is of another type than its field declares.
    """

    def __post_init__(self) -> None:
        field_types.check(self)

    def at(self, path: str) -> Self:
        """These settings as they hold for the module at `path`."""
        return self

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        """As in `ModuleConfig`."""
        yield from ()


def nested(cls: type[Nested], value: Any, where: str) -> Any:
    """Nested settings as their own class; files and method strings give a mapping.

    Raises:
        ConfigError: It is neither, or has a setting that is not known.
    """
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}={value!r}; a {cls.__name__} or a mapping of its settings was expected.")
    known = {entry.name for entry in dataclasses.fields(cls)}
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: {cls.__name__} has no setting {key!r}.{nearest(str(key), known)}")
    return cls(**value)


@dataclass
class PeftConfig:
    """What every adapter file says.

    Args:
        task_type: One of `TaskType`, or none.
        peft_type: Name of the method in files; set by the class.
        auto_mapping: Class and module of a base model that is not found through its task.
        peft_version: Version of the file format.
        base_model_name_or_path: The base model the adapter was trained on.
        revision: Its revision on the hub.
        inference_mode: Whether the adapter is loaded frozen.

    Raises:
        ConfigError: A value is not allowed.
    """

    adapter: ClassVar[Any] = None
    """The `Adapter` class that carries the method out."""
    peft_name: ClassVar[str | None] = None
    own_fields: ClassVar[frozenset[str]] = frozenset()
    """Inherited fields that `peft`'s class of the method has not, and would warn of: treated as those made by `own`."""
    learning_rates: ClassVar[Mapping[str, float]] = {"classification": 1e-3, "causal-lm": 5e-4}
    """Where a run names none: adapters start near zero and want some ten times the rates of full fine-tuning; a new
    head wants the higher one, and language models lose sooner what they know."""

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        field_types.check(self)
        if self.task_type is not None:
            if self.task_type not in list(TaskType):
                raise ConfigError(
                    f"task_type={self.task_type!r} is not one of {', '.join(TaskType)}."
                    + nearest(str(self.task_type), list(TaskType))
                )
            self.task_type = TaskType(self.task_type)
        if self.peft_name is not None and self.peft_type not in (None, self.peft_name):
            raise ConfigError(
                f"{type(self).__name__}(peft_type={self.peft_type!r}): its files say {self.peft_name!r}. "
                "Leave peft_type out, or use the configuration class of the method."
            )
        self.peft_type = self.peft_name or self.peft_type
        self.peft_version = self.peft_version or PEFT_FORMAT
        for entry in dataclasses.fields(self):
            if "planned" in entry.metadata and getattr(self, entry.name) not in (_default(entry), None):
                raise ConfigError(
                    f"{type(self).__name__}({entry.name}={getattr(self, entry.name)!r}): {entry.metadata['planned']} "
                    f"is not in this version of Veneer. Leave {entry.name} at {_default(entry)!r}."
                )

    def method(self) -> type[Adapter]:
        """The class that carries out what these settings ask for; `adapter`, or a variant of it."""
        return self.adapter

    @property
    def is_prompt_learning(self) -> bool:
        return False

    def at(self, path: str) -> Self:
        """This configuration as it holds for the module at `path` (patterns resolved)."""
        return self

    def begin(self, steps: int) -> None:
        """Called when a training begins, with the number of its optimiser steps; for methods with a schedule.

        Raises:
            ConfigError: They do not suffice.
        """

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-compatible values.

        Raises:
            ConfigError: A field holds a function, for example a predicate as `target_modules`.
        """
        return {
            entry.name: _plain(getattr(self, entry.name), entry.name)
            for entry in dataclasses.fields(self)
            if not ("own" in entry.metadata or entry.name in self.own_fields)
            or getattr(self, entry.name) != entry.default
        }

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes `adapter_config.json` into the folder, completely or not at all."""
        files.write_text(Path(save_directory) / CONFIG_NAME, self.to_text())

    def to_text(self) -> str:
        """What `adapter_config.json` holds.

        Raises:
            ConfigError: A value has no form in JSON.
        """
        values = self.to_dict()
        try:  # fields are sorted; patterns keep their order, since the first that matches counts
            return json.dumps({name: values[name] for name in sorted(values)}, indent=2) + "\n"
        except TypeError as error:
            raise ConfigError(f"{type(self).__name__} cannot be written to a file: {error}.") from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **overrides: Any) -> PeftConfig:
        """Reads the configuration of the adapter in a folder or on the hub; returns the method's own class.

        Raises:
            CheckpointError: There is no such file, or it is not a JSON object.
            ConfigError: It names an unknown method or an unknown key with a value that matters.
        """
        hub = {name: overrides.pop(name) for name in files.HUB_ARGUMENTS & set(overrides)}
        path = files.find(pretrained_model_name_or_path, CONFIG_NAME, **hub)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path}: not readable as JSON ({error}). Restore or save the adapter again."
            ) from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: a JSON object was expected, found a {type(values).__name__}.")
        from veneer import legacy

        if "peft_type" not in values:
            return dataclasses.replace(legacy.load(pretrained_model_name_or_path, **hub)[0], **overrides)
        return cls.from_dict({**legacy.settings(values, str(path)), **overrides}, where=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter configuration") -> PeftConfig:
        """The configuration that a file's values describe; `peft_type` chooses the class.

        A key that this version does not know is an error, unless its value is empty, false or zero: then it asks
        for nothing, and files of newer versions stay readable.

        Raises:
            ConfigError: Unknown method or key, or a value that is not allowed.
        """
        values = dict(values)
        said = values.get("peft_type") or cls.peft_name
        if cls.peft_name is None or said != cls.peft_name:
            return config_class(str(said or ""), where).from_dict(values, where)
        names = {entry.name for entry in dataclasses.fields(cls)}
        for key in sorted(set(values) - names):
            value = values.pop(key)
            if value:
                raise ConfigError(
                    f"{where}: {cls.__name__} has no setting {key!r} (value {value!r}).{nearest(key, names)} "
                    "Remove the key if it does not matter, or use a version of Veneer that knows it."
                )
            warnings.warn(f"{where}: ignored the unknown, empty setting {key!r}.", VeneerWarning, stacklevel=3)
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


@dataclass
class ModuleConfig(PeftConfig):
    """Which modules a method attaches to; the base of all methods that attach to modules.

    Args:
        target_modules: Names or suffixes of modules, one regular expression for the whole path, `"all-linear"`, a place
            such as `"ffn-output"`, or a function `(path, module) -> bool`. None takes the method's default.
        exclude_modules: Names or suffixes, or one regular expression; wins over `target_modules`.
        layers_to_transform: Indices of the layers to adapt; none for all.
        layers_pattern: Name of the list that the layers stand in, where it is not found by itself.
        modules_to_save: Modules that are trained as a whole, in a copy of their own; by the end of their path, as
            `peft` reads it, so that `classifier` means `pre_classifier` too.
        target_parameters: Bare parameters to adapt, such as `"experts.gate_up_proj"`.
    """

    default_targets: ClassVar[tuple[Any, ...]] = ()
    """What `target_modules=None` means: the first that matches. Empty means the query and value projections."""
    patterns: ClassVar[Mapping[str, str]] = {}
    """Fields that hold settings of single places, by the end of their path or a regular expression for it, each with
    the field that it stands in for: `{"rank_pattern": "r"}`."""

    target_modules: Any = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, set | tuple | frozenset | range):
                setattr(self, name, sorted(value))
        if isinstance(self.exclude_modules, str):
            check_expression("exclude_modules", self.exclude_modules)
        patterns = self.layers_pattern or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            check_expression("layers_pattern", pattern)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            from veneer.targets import is_shorthand

            if not is_shorthand(self.target_modules):
                raise ConfigError(
                    "layers_to_transform cannot be combined with a regular expression in target_modules "
                    f"({self.target_modules!r}). Put the layer numbers into the expression, or name modules in a list."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern was given without layers_to_transform, so it would choose nothing.")
        for name in self.patterns:
            for pattern in getattr(self, name) or ():
                check_expression(name, pattern)

    def at(self, path: str) -> Self:
        changes = {}
        for name, setting in self.patterns.items():
            value = by_pattern(getattr(self, name) or {}, path, getattr(self, setting))
            if value != getattr(self, setting):
                changes[setting] = value
        return dataclasses.replace(self, **changes) if changes else self

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        """This configuration with its targets filled in where they depend on the model as a whole.

        Args:
            root: The model.
            modules: Its modules by path, without adapters.
        """
        return self

    def companions(self) -> Sequence[ModuleConfig]:
        """Methods that are attached beside this one, under the same name, to places that it does not adapt."""
        return ()

    def resolved(self, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> Self:
        """This configuration with what it leaves to the model filled in, as it is saved.

        Args:
            modules: All modules of the model by path.
            paths: Those that are adapted.
        """
        return self

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        """Settings for single places that none of the adapted ones makes use of, each as a sentence."""
        for name in self.patterns:
            patterns = getattr(self, name) or ()
            if idle := [pattern for pattern in patterns if not any(matches(pattern, path) for path in paths)]:
                yield f"{name}: {idle} match none of the adapted modules."


@dataclass
class WeightConfig(ModuleConfig):
    """What the configurations of most weight methods say besides.

    Args:
        bias: Biases of the base model that are trained beside the method: `"none"`, those of the adapted layers
            (`"<method>_only"`, such as `"lora_only"`), or `"all"`. The base model's own stay as they are; each adapter
            has deltas of its own.
        fan_in_fan_out: Kept for `peft`'s files; how a layer stores its weight is seen from the layer.

    Raises:
        ConfigError: `bias` is none of these.
    """

    bias_only: ClassVar[str | None] = None
    """The name of `"<method>_only"` where it is not that of the method."""

    bias: str = "none"
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = ("none", "all", self.bias_only or f"{(self.peft_name or 'method').lower()}_only")
        if self.bias.lower() not in allowed:
            raise ConfigError(f"{type(self).__name__}: bias={self.bias!r}; one of {', '.join(allowed)} was expected.")


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def matches(pattern: str, path: str) -> bool:
    """Whether the pattern matches the end of the path at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def check_positive(config: PeftConfig, *names: str) -> None:
    """Refuses zero and negative numbers in these fields; of patterns, in their values.

    Raises:
        ConfigError: So.
    """
    for name in names:
        value = getattr(config, name)
        values = {f"{name}[{key!r}]": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        for where, number in values.items():
            if number is not None and number <= 0:
                kind = "number" if isinstance(number, float) else "whole number"
                raise ConfigError(f"{type(config).__name__}: {where}={number!r}; a positive {kind} was expected.")


def check_shares(config: PeftConfig, *names: str) -> None:
    """Refuses what is no share to be dropped, in [0, 1).

    Raises:
        ConfigError: So.
    """
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(
                f"{type(config).__name__}: {name}={getattr(config, name)!r}; a share in [0, 1) was expected."
            )


def check_expression(setting: str, expression: str) -> None:
    """Refuses what is no regular expression.

    Raises:
        ConfigError: So.
    """
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{setting}: {expression!r} is not a valid regular expression: {error}.") from error


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration that the values of an `adapter_config.json` describe."""
    return PeftConfig.from_dict(config_dict)


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name), where) for entry in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, StrEnum):
        return value.value
    if callable(value):
        raise ConfigError(
            f"{where}={getattr(value, '__qualname__', value)} is a function and cannot be written to a file. Name the "
            "modules instead."
        )
    return value
