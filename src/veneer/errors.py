"""Every error that Veneer raises on purpose.

A message names the place, what was given, what was expected, and the fix. The classes also derive
from the built-in error that a caller of `peft` would catch, so existing `except ValueError` keeps working.
"""

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """Base class of all deliberate errors."""


class ConfigError(VeneerError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class TargetError(VeneerError, ValueError):
    """A target matches nothing, or matches a module that the method cannot adapt."""


class UnsupportedError(VeneerError, NotImplementedError):
    """The operation has no meaning for this method, site or model. The message says why."""


class StateError(VeneerError, RuntimeError):
    """The model is not in a state that allows the operation (for example, an adapter is merged)."""


class CheckpointError(VeneerError, RuntimeError):
    """An adapter file is missing, truncated, corrupted, or does not fit the model."""


class BaseMismatchError(CheckpointError):
    """The adapter was trained on another base model."""


class DataError(VeneerError, ValueError):
    """A data set cannot be read, or cannot be used for the task."""


class VeneerWarning(UserWarning):
    """Something is probably not what the user meant, but can be carried out."""


def nearest(name: str, options: Iterable[str], limit: int = 3) -> str:
    """The options that look most like `name`, as the end of a message; empty where nothing is near.

    >>> nearest("leanring_rate", ["learning_rate", "seed"])
    " Did you mean 'learning_rate'?"
    >>> nearest("zzz", ["learning_rate"])
    ''
    """
    matches = difflib.get_close_matches(name, [str(option) for option in options], n=limit, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(m) for m in matches)}?" if matches else ""
