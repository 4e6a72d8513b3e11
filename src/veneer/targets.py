"""Which modules a configuration means.

`walk` lists a model's modules by the paths they have without adapters; `match` chooses among them. Nothing is chosen
silently: a target that matches nothing is an error that names the nearest matches.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from veneer import structure
from veneer.adapted import Adapted
from veneer.config import ModuleConfig, TaskType
from veneer.errors import TargetError, VeneerWarning, nearest

ALL_LINEAR = "all-linear"

# Heads of classification models; trained whole, so no adapter goes on them.
HEADS = ("classifier", "score", "qa_outputs", "classification_head")


def is_shorthand(expression: object) -> bool:
    """Whether a target string is a word of this library rather than a regular expression."""
    return isinstance(expression, str) and expression.lower() in (ALL_LINEAR, *structure.PLACES)


def walk(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all modules below `root`; wrappers are passed through, adapters are left out."""
    for name, child in root.named_children():
        path = f"{prefix}.{name}" if prefix else name
        inner = frozen(child)
        yield path, inner
        yield from walk(inner, path)


def frozen(module: nn.Module) -> nn.Module:
    """The module without any wrapper around it."""
    while isinstance(module, Adapted):
        module = module.frozen_layer
    return module


def match(
    root: nn.Module, config: ModuleConfig, *, strict: bool = True, modules: Mapping[str, nn.Module] | None = None
) -> list[str]:
    """Paths of the modules that the configuration targets, in model order.

    Args:
        root: The model.
        config: Its `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern` and `modules_to_save`.
        strict: Whether a part of the configuration that matches nothing is worth a warning.
        modules: What `walk` lists, where it is at hand.

    Raises:
        TargetError: Nothing matches.
    """
    modules = dict(walk(root)) if modules is None else modules
    targets = resolve(root, config, modules)
    chosen = _in_layers(_choose(targets, modules, root, config), config)
    chosen = [path for path in chosen if not _excluded(path, config)]
    if not chosen:
        raise TargetError(_nothing(targets, modules, config))
    if strict:
        for said in _unmatched(targets, chosen, modules, config):
            warnings.warn(f"{type(root).__name__}: {said}", VeneerWarning, stacklevel=3)
    return chosen


def resolve(root: nn.Module, config: ModuleConfig, modules: Mapping[str, nn.Module]) -> Any:
    """The targets in a form that a file can hold and `peft` can read: a list of names or an expression.

    Words are spelled out: `peft` means more by `all-linear` than modules on models whose experts are bare parameters.

    Raises:
        TargetError: The method has no default on this model, a place is not found, or a function chooses nothing.
    """
    targets = config.target_modules
    if targets is None:
        targets = default_targets(config, root, modules)
    words = targets if isinstance(targets, list) else [targets]
    if callable(targets) or any(is_shorthand(word) for word in words):
        paths = _in_layers(_choose(targets, modules, root, config), config)
        if not paths:
            raise TargetError(_nothing(targets, modules, config))
        return exactly(paths, _in_layers(modules, config))
    return targets


def exactly(paths: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """Targets that match these paths and no others: names, paths, or an expression where another path ends like one.

    >>> exactly(["a.q", "b.q"], ["a.q", "b.q", "b.k"]), exactly(["a.q"], ["a.q", "b.q"]), exactly(["q"], ["q", "b.q"])
    (['q'], ['a.q'], 'q')
    """
    wanted = set(paths)
    names = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    numbers = any(name.isdigit() for name in names)  # of elements of a list, which say little on their own
    if not numbers and all(path in wanted for path in modules if path.rpartition(".")[2] in names):
        return list(names)
    clear = all(path in wanted or wanted.isdisjoint(_suffixes(path)) for path in modules)
    return list(paths) if clear else "|".join(re.escape(path) for path in paths)


def default_targets(config: ModuleConfig, root: nn.Module, modules: Mapping[str, nn.Module]) -> Any:
    """What `target_modules=None` means for this method on this model.

    Raises:
        TargetError: The method has no default here.
    """
    options = type(config).default_targets or (structure.attention_inputs(modules) or [],)
    default = next((option for option in options if any(_choose(option, modules, root, config))), None)
    if default is None:
        raise TargetError(
            f"{type(config).__name__} has no default targets for {type(root).__name__}. Set target_modules, for "
            f"example to {ALL_LINEAR!r} or to some of {_names(modules)[:8]}."
        )
    return default


def input_embedding(root: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Path of the embedding of the model's input tokens."""
    try:
        module = getattr(root, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # vision models have none
        return None
    found = None if module is None else frozen(module)
    return next((path for path, other in modules.items() if other is found), None)


def output_embedding(root: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Path of the layer that turns hidden states into scores of tokens; none where the model has none."""
    module = getattr(root, "get_output_embeddings", lambda: None)()
    found = None if module is None else frozen(module)
    return next((path for path, other in modules.items() if other is found), None)


def _choose(targets: Any, modules: Mapping[str, nn.Module], root: nn.Module, config: ModuleConfig) -> Iterable[str]:
    if callable(targets):
        return [path for path, module in modules.items() if targets(path, module)]
    if is_shorthand(targets):
        word = targets.lower()
        if word == ALL_LINEAR:
            return _all_linear(modules, root, config)
        return structure.place(word, modules, input_embedding(root, modules) if word == "embedding-output" else None)
    if isinstance(targets, str):
        try:
            expression = re.compile(targets)
        except re.error as error:
            raise TargetError(f"target_modules={targets!r} is not a valid regular expression: {error}.") from error
        return [path for path in modules if expression.fullmatch(path)]
    words = [name for name in targets if is_shorthand(name)]
    named = {path for word in words for path in _choose(word, modules, root, config)}
    names = set(targets) - set(words)
    return [path for path in modules if path in named or any(suffix in names for suffix in _suffixes(path))]


def _all_linear(modules: Mapping[str, nn.Module], root: nn.Module, config: ModuleConfig) -> list[str]:
    """All linear layers except the output head, which is either tied to the embedding or trained whole."""
    output = getattr(root, "get_output_embeddings", lambda: None)()
    output = frozen(output) if output is not None else None
    heads = HEADS if output is None and config.task_type == TaskType.SEQ_CLS else ()
    return [
        path
        for path, module in modules.items()
        if structure.is_linear(module) and module is not output and path.partition(".")[0] not in heads
    ]


def names(targets: Sequence[str] | str, path: str) -> bool:
    """Whether a list of names, or an expression for whole paths, means this path."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(suffix in targets for suffix in _suffixes(path))


def _suffixes(path: str) -> list[str]:
    """All that a target name may say of this path: `a.b.c`, `b.c` and `c`."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _has_suffix(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name) or is_shorthand(name)


def _excluded(path: str, config: ModuleConfig) -> bool:
    exclude = config.exclude_modules
    if isinstance(exclude, str) and re.fullmatch(exclude, path):
        return True
    if isinstance(exclude, list) and any(_has_suffix(path, name) for name in exclude):
        return True
    # A module that is trained whole, and all within it, takes no adapter.
    parts = path.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(parent.endswith(name) for name in config.modules_to_save or () for parent in above)


def _layers(config: ModuleConfig) -> list[int]:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers or []


def _in_layers(paths: Iterable[str], config: ModuleConfig) -> list[str]:
    """The paths that `layers_to_transform` leaves."""
    if config.layers_to_transform is None:
        return list(paths)
    return [path for path in paths if _layer_of(path, config) in _layers(config)]


def _layer_of(path: str, config: ModuleConfig) -> int | None:
    """Index of the layer that a module is in."""
    patterns = config.layers_pattern
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]+"]
    # The first number counts: in "layers.3.experts.0" the layer is 3.
    found = (re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)(?:\.|$)", path) for pattern in patterns)
    return next((int(m.group(1)) for m in found if m), None)


def _unmatched(
    targets: Any, chosen: Sequence[str], modules: Mapping[str, nn.Module], config: ModuleConfig
) -> Iterator[str]:
    """Parts of the configuration that have no effect on this model, each with the nearest that would have one."""
    exclude = config.exclude_modules
    for setting, names in (("target_modules", targets), ("exclude_modules", exclude)):
        wrong = [n for n in names if not any(_has_suffix(p, n) for p in modules)] if isinstance(names, list) else []
        if wrong:
            yield f"{setting}: {wrong} match no module." + "".join(nearest(name, _names(modules)) for name in wrong)
    if isinstance(exclude, str) and not any(re.fullmatch(exclude, path) for path in modules):
        yield f"exclude_modules={exclude!r} matches no module. It is a regular expression for the whole path."
    missing = set(_layers(config)) - {_layer_of(path, config) for path in chosen}
    if missing:
        yield f"layers_to_transform: there is nothing to adapt in the layers {sorted(missing)}."


def _names(modules: Iterable[str]) -> list[str]:
    """Distinct last parts of the paths, numbers left out where there are names, in model order."""
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in modules)
    return [leaf for leaf in leaves if not leaf.isdigit()] or list(leaves)


def _nothing(targets: Any, modules: Mapping[str, nn.Module], config: ModuleConfig) -> str:
    names = [targets] if isinstance(targets, str) else targets if isinstance(targets, list) else []
    known = _names(modules)
    hints = "".join(dict.fromkeys(nearest(str(name), known) for name in names if name not in known))
    if isinstance(targets, str) and any(_has_suffix(path, targets) for path in modules):
        hints += f" It is a regular expression for the whole path; write a list to name modules: ['{targets}']."
    limits = {
        "exclude_modules": config.exclude_modules,
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
        "modules_to_save": config.modules_to_save,
    }
    said = ", ".join(f"{name}={value!r}" for name, value in limits.items() if value is not None)
    shown = getattr(targets, "__name__", None) if isinstance(targets, Callable) else repr(targets)  # type: ignore[arg-type]
    return (
        f"target_modules={shown} matches no module{f' (with {said})' if said else ''}.{hints} "
        f"The model has {', '.join(known[:20])}."
    )
