"""A configuration's values held to the types that its fields declare, whether they come from code, text or a file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from veneer.errors import ConfigError, nearest

Kind = TypeVar("Kind", bound=StrEnum)


def check(settings: Any) -> None:
    """Holds every field of a dataclass to its type; fields that are only planned have a rule of their own.

    Raises:
        ConfigError: A value is of another type.
    """
    hints = _hints(type(settings))  # type: ignore[arg-type]  # classes have a hash, whatever their instances have
    for entry in dataclasses.fields(settings):
        value, hint = getattr(settings, entry.name), hints.get(entry.name, Any)
        if "planned" in entry.metadata or fits(value, hint):
            continue
        message = f"{type(settings).__name__}: {entry.name}={value!r}; {_shown(hint)} was expected."
        if isinstance(value, str) and fits([value], hint):
            message += f" Write it as a list: [{value}]."
        if get_origin(hint) is Literal:
            message += nearest(str(value), get_args(hint))
        raise ConfigError(message)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; whole numbers fit where floats do, and any collection of items where a list does.

    >>> fits(8, float), fits(True, int), fits({"q": 4}, dict[str, int]), fits("q", list[str] | None)
    (True, False, True, False)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list | tuple | set | frozenset | range) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else origin or hint or NoneType)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Types of the fields; none where a type cannot be looked up, and then nothing is checked."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def member(settings: Any, field: str, kinds: type[Kind]) -> Kind:
    """The one of some names that a field has, in letters of either case, or as another library's enumeration.

    Raises:
        ConfigError: It has none of them.
    """
    value = getattr(settings, field)
    name = str(getattr(value, "value", value)).upper()
    if name not in list(kinds):
        raise ConfigError(
            f"{type(settings).__name__}: {field}={value!r}; one of {', '.join(kinds)} was expected."
            + nearest(name, list(kinds))
        )
    return kinds(name)


def _shown(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
