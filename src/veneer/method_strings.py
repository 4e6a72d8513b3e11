"""Methods written as strings (`"lora:r=16"`) or mappings, and the configurations that they describe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from veneer.config import PeftConfig
from veneer.errors import ConfigError, nearest
from veneer.registry import method_names, preset_of


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
    name, values = read_method(spec)
    names = method_names()
    if name not in names:
        raise ConfigError(f"Unknown method {name!r}.{nearest(str(name), names)} Known: {', '.join(names)}.")
    cls, preset = preset_of(name)
    fields = {entry.name for entry in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"The method {name!r} has no setting {key!r}.{nearest(str(key), fields)}")
    return cls(**{**preset, **values})


def read_method(spec: str | Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The name in a method string or mapping, and the settings that are given with it, neither checked.

        >>> read_method("lora:r=4,bias=none")
        ('lora', {'r': 4, 'bias': 'none'})

    Raises:
        ConfigError: It cannot be read.
    """
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
    return name, values


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
