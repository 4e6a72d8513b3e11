"""Configurations of methods: their registry, their JSON file, and methods written as strings.

A method is a dataclass derived from `PeftConfig` whose `adapter` names the module that implements it. Registering it
makes it loadable from files (`peft_type`) and from strings (`"lora:r=16"`). Modules in `veneer.methods`, and those that
other packages name in the entry-point group `veneer.methods`, register themselves when they are imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import pkgutil
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import yaml

from veneer import field_types, files
from veneer.errors import CheckpointError, ConfigError, VeneerWarning, nearest

if TYPE_CHECKING:
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


class _PeftTypes(type):
    """Answers any registered name, so that the list of methods is never closed."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return config_class(name).peft_name or name
        except ConfigError as error:
            raise AttributeError(str(error)) from error  # what `hasattr` expects

    def __iter__(cls) -> Iterator[str]:
        _discover()
        return iter(sorted(_by_peft_type))


class PeftType(metaclass=_PeftTypes):
    """Names of methods in files, as attributes: `PeftType.LORA == "LORA"`."""


def planned(default: Any, what: str) -> Any:
    """A field of `peft`'s files that can be read, but of which only the default is carried out in this version."""
    make = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata={"planned": what})


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

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-compatible values.

        Raises:
            ConfigError: A field holds a function, for example a predicate as `target_modules`.
        """
        return {entry.name: _plain(getattr(self, entry.name), entry.name) for entry in dataclasses.fields(self)}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes `adapter_config.json` into the folder, completely or not at all."""
        files.write_text(Path(save_directory) / CONFIG_NAME, self.to_text())

    def to_text(self) -> str:
        """What `adapter_config.json` holds.

        Raises:
            ConfigError: A value has no form in JSON.
        """
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
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
        values.update(overrides)
        return cls.from_dict(values, where=str(path))

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
    """

    default_targets: ClassVar[tuple[Any, ...]] = ()
    """What `target_modules=None` means: the first that matches. Empty means the query and value projections."""

    target_modules: Any = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

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

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        """Settings for single places that none of the adapted ones makes use of, each as a sentence."""
        yield from ()


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

    bias: str = "none"
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = ("none", "all", f"{(self.peft_name or 'method').lower()}_only")
        if self.bias.lower() not in allowed:
            raise ConfigError(f"{type(self).__name__}: bias={self.bias!r}; one of {', '.join(allowed)} was expected.")


def check_expression(setting: str, expression: str) -> None:
    """Refuses what is no regular expression.

    Raises:
        ConfigError: So.
    """
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{setting}: {expression!r} is not a valid regular expression: {error}.") from error


ConfigClass = TypeVar("ConfigClass", bound=type[PeftConfig])

_by_peft_type: dict[str, type[PeftConfig]] = {}
_by_name: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {}
_discovered = False


def register(name: str, **preset: Any) -> Callable[[ConfigClass], ConfigClass]:
    """Class decorator that enters a configuration under a method name; fields in `preset` differ from its defaults.

    Raises:
        ConfigError: Another class already has the name or the `peft_name`.
    """

    def enter(cls: ConfigClass) -> ConfigClass:
        if cls.peft_name is None or cls.adapter is None:
            raise ConfigError(f"{cls.__name__} needs the class attributes `peft_name` and `adapter` to be registered.")
        for table, key, old in (
            ("method", name, _by_name.get(name, (cls,))[0]),
            ("peft_type", cls.peft_name, _by_peft_type.get(cls.peft_name, cls)),
        ):
            if old is not cls and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(f"The {table} {key!r} of {cls.__name__} is already taken by {old.__name__}.")
        _by_name[name] = (cls, preset)
        _by_peft_type[cls.peft_name] = cls
        return cls

    return enter


def _discover() -> None:
    """Imports every module that registers a method."""
    global _discovered
    if _discovered:
        return
    from veneer import methods

    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    for entry_point in importlib.metadata.entry_points(group="veneer.methods"):
        try:
            entry_point.load()
        except Exception as error:  # one broken package may not take all other methods away
            warnings.warn(
                f"The methods of {entry_point.value!r}, which an installed package offers as {entry_point.name!r}, are "
                f"left out: {type(error).__name__}: {error}. Update that package or remove it.",
                VeneerWarning,
                stacklevel=3,
            )
    _discovered = True


def method_names() -> list[str]:
    """All registered method names, sorted."""
    _discover()
    return sorted(_by_name)


def methods() -> Iterator[tuple[str, type[PeftConfig], dict[str, Any]]]:
    """Name, configuration class and preset fields of every registered method, sorted by name."""
    _discover()
    for name in sorted(_by_name):
        yield name, *_by_name[name]


def config_class(peft_type: str, where: str = "") -> type[PeftConfig]:
    """The configuration class whose files carry this `peft_type`.

    Raises:
        ConfigError: No registered method has it.
    """
    if peft_type not in _by_peft_type:
        _discover()
    if peft_type not in _by_peft_type:
        raise ConfigError(
            f"{where + ': ' if where else ''}peft_type {peft_type!r} is no method of this version."
            f"{nearest(peft_type, _by_peft_type)} It has {', '.join(sorted(_by_peft_type))}."
        )
    return _by_peft_type[peft_type]


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration that the values of an `adapter_config.json` describe."""
    return PeftConfig.from_dict(config_dict)


def parse_method(spec: str | Mapping[str, Any] | PeftConfig) -> PeftConfig:
    """The configuration that a method string or mapping describes.

        >>> parse_method("lora:r=4,target_modules=[query,value]").r
        4
        >>> parse_method({"name": "lora", "lora_alpha": 32}).lora_alpha
        32

    Values are written as in YAML; commas inside brackets do not separate settings.

    Raises:
        ConfigError: Unknown method or setting, or a value of the wrong type; names the nearest known one.
    """
    if isinstance(spec, PeftConfig):
        return spec
    values: dict[str, Any]
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        values = {}
        for key, value in (_parse_setting(part, spec) for part in _split(rest)):
            if key in values:
                raise ConfigError(f"Method string {spec!r}: {key!r} is set twice. Leave one of them out.")
            values[key] = value
    elif not isinstance(spec, Mapping):
        raise ConfigError(
            f"{spec!r} describes no method. Give a string such as 'lora:r=8', a mapping with a 'name', or a "
            "configuration."
        )
    else:
        values = dict(spec)
        if "name" not in values:
            raise ConfigError(f"The method {values!r} has no 'name'. Give one of {', '.join(method_names())}.")
        name = values.pop("name")
    names = method_names()
    if name not in names:
        raise ConfigError(f"Unknown method {name!r}.{nearest(str(name), names)} Known: {', '.join(names)}.")
    cls, preset = _by_name[name]
    fields = {entry.name for entry in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"The method {name!r} has no setting {key!r}.{nearest(str(key), fields)}")
    return cls(**{**preset, **values})


def _split(text: str) -> list[str]:
    """Splits at commas that are not inside brackets or quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def _parse_setting(part: str, spec: str) -> tuple[str, Any]:
    key, equals, value = part.partition("=")
    if not equals:
        raise ConfigError(f"Method string {spec!r}: {part!r} is not of the form setting=value.")
    try:
        return key.strip(), yaml.load(value, _Yaml)  # a safe loader
    except yaml.YAMLError as error:
        raise ConfigError(
            f"Method string {spec!r}: the value of {key.strip()!r} is not readable: {value!r}. "
            "Close its brackets, or put it in quotes."
        ) from error


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as it is in JSON and in later versions of YAML."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name), where) for entry in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if callable(value):
        raise ConfigError(
            f"{where}={getattr(value, '__qualname__', value)} is a function and cannot be written to a file. Name the "
            "modules instead."
        )
    return value
