"""Which methods there are: the table that configurations enter themselves into, by method name and by type in files.

Modules in `veneer.methods`, and those that other packages name in the entry-point group `veneer.methods`, register
themselves when they are imported; that happens when a name is first looked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from veneer.errors import ConfigError, VeneerWarning, nearest

if TYPE_CHECKING:
    from veneer.config import PeftConfig

ConfigClass = TypeVar("ConfigClass", bound="type[PeftConfig]")

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


def preset_of(name: str) -> tuple[type[PeftConfig], dict[str, Any]]:
    """Configuration class of a registered method, and the fields that its name sets."""
    return _by_name[name]


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
