"""Putting adapters on a model and taking them off: nothing is changed before everything has been checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from veneer.adapted import Adapted, Switch, adapters_of, wrappers
from veneer.adapter import Adapter
from veneer.config import ModuleConfig, PeftConfig
from veneer.errors import ConfigError, StateError, TargetError, VeneerWarning, nearest
from veneer.sites import ParameterSite, Site, parameter_site, site_of
from veneer.targets import frozen, match, resolve, walk
from veneer.trained_copy import TrainedCopy, tied_modules, warn_if_tied

Place = tuple[str, str | None]
"""Path of a module, and the name of its bare parameter where that is what is adapted."""


def attach(
    root: nn.Module,
    name: str,
    config: PeftConfig,
    switch: Switch,
    *,
    start: bool = True,
    autocast: bool = True,
    optional_copies: Iterable[str] = (),
) -> PeftConfig:
    """Puts the adapters that `config` describes on `root`, under `name`.

    Args:
        root: The model, with or without other adapters.
        name: Name of the adapter.
        config: The method and its targets.
        switch: The model's switch.
        start: Write starting values. False leaves the parameters without memory, to be filled from a file.
        autocast: Keep adapters in float32 where the model is in a 16-bit type.
        optional_copies: Modules that are trained whole where the model has them.

    Returns:
        The configuration with its targets resolved, as it is saved.

    Raises:
        ConfigError: The name is taken or not usable.
        TargetError: A target matches nothing or cannot be adapted; the model is left as it was.
    """
    check_name(name, root)
    if not isinstance(config, ModuleConfig) or config.adapter is None:
        raise ConfigError(f"{type(config).__name__} describes no method that attaches to modules.")
    planned: list[tuple[Place, Adapter]] = []
    parameters = getattr(config, "target_parameters", None)
    if config.target_modules is not None or not parameters:
        config = replace(config, target_modules=resolve(root, config))
        for path in match(root, config, strict=start):
            planned.append(((path, None), _build(root, path, None, config, start)))
    for path, parameter in _parameter_places(root, parameters or ()):
        planned.append(((path, parameter), _build(root, path, parameter, config, start)))
    copies = _copies(root, config, optional_copies)
    for place, adapter in [*planned, *(((path, None), copy) for path, copy in copies.items())]:
        wrapper = _wrapper_at(root, place, switch)
        if adapter.site is not None:
            # Adapters of one place share its view; that of a bare parameter reaches through the wrappers of others.
            adapter.site = wrapper.site
        _fit(adapter, wrapper, autocast)
        wrapper.adapters[name] = adapter
    if getattr(config, "ensure_weight_tying", False):
        _tie(root, list(copies.values()), list(copies))
    return config


def check_name(name: str, root: nn.Module) -> None:
    """Refuses adapter names that are taken or cannot name a module.

    Raises:
        ConfigError: So.
    """
    if any(True for _ in adapters_of(root, name)):
        raise ConfigError(f"An adapter named {name!r} is already there. Delete it first, or choose another name.")
    if not name or "." in name or name.startswith("_") or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: a name may not be empty, contain a dot, start with an underscore, or be "
            "a method of torch.nn.ModuleDict such as 'keys'."
        )


def detach(root: nn.Module, name: str) -> None:
    """Takes the named adapter off; wrappers that are left empty are removed."""
    for wrapper, _ in list(adapters_of(root, name)):
        del wrapper.adapters[name]
    unwrap(root, lambda wrapper: wrapper.base_layer, lambda wrapper: not wrapper.adapters)


def unwrap(
    root: nn.Module,
    replacement: Callable[[Adapted], nn.Module],
    condition: Callable[[Adapted], bool] = lambda wrapper: True,
) -> None:
    """Puts `replacement(wrapper)` in the place of every wrapper that meets the condition, inner ones first."""
    for parent in reversed(list(root.modules())):
        for name, child in list(parent.named_children()):
            if isinstance(child, Adapted) and condition(child):
                parent._modules[name] = replacement(child)


def switch_of(root: nn.Module) -> Switch | None:
    """The switch of a model that has adapters."""
    return next((wrapper.switch for wrapper in wrappers(root)), None)


def _build(root: nn.Module, path: str, parameter: str | None, config: ModuleConfig, start: bool) -> Adapter:
    parent, leaf = _resolve(root, path)
    module = frozen(parent._modules[leaf])  # type: ignore[arg-type]
    site: Site | None = site_of(module) if parameter is None else parameter_site(module, parameter)
    cls: type[Adapter] = config.adapter
    if cls.kinds and (site is None or site.kind not in cls.kinds):
        what = f"a {site.kind} layer" if site is not None else "no layer with a weight that is known"
        raise TargetError(
            f"{path} is a {type(module).__name__}, {what}; {cls.__name__} adapts {', '.join(sorted(cls.kinds))} "
            "layers. Narrow `target_modules`, or name the module in `exclude_modules`."
        )
    if isinstance(parent, nn.MultiheadAttention) and parameter is None:
        raise TargetError(
            f"{path}: torch.nn.MultiheadAttention reads the weight of {leaf} without calling it, so an adapter there "
            f"would have no effect. Target the tensor itself: target_parameters=['{path}.weight']."
        )
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fused inference kernel reads the weights of its layers without calling them.
        torch.backends.mha.set_fastpath_enabled(False)
    with torch.device("cpu" if start else "meta"):
        adapter = cls(site, config.at(path))
    if start:
        adapter.reset()
    return adapter


def _fit(adapter: Adapter, wrapper: Adapted, autocast: bool) -> None:
    """Moves the adapter to where its layer computes, in the layer's type or float32."""
    site = adapter.site if adapter.site is not None else wrapper.site
    like = next(wrapper.base_layer.parameters(), None) if site is None else None
    dtype = site.dtype if site is not None else like.dtype if like is not None else torch.get_default_dtype()
    if (autocast and dtype in (torch.float16, torch.bfloat16)) or not dtype.is_floating_point:
        dtype = torch.float32
    adapter.to(dtype=dtype)
    device = site.device if site is not None else like.device if like is not None else None
    if device is not None and device.type != "meta" and not any(p.is_meta for p in adapter.parameters()):
        adapter.to(device)


def _resolve(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path`, and its last name; wrappers on the way are passed through."""
    parent = root
    *above, leaf = path.split(".")
    for name in above:
        parent = frozen(parent._modules[name])  # type: ignore[arg-type]
    return parent, leaf


def _wrapper_at(root: nn.Module, place: Place, switch: Switch) -> Adapted:
    """The wrapper for a place, put there if it is not yet."""
    path, parameter = place
    parent, leaf = _resolve(root, path)
    child = parent._modules[leaf]
    assert child is not None
    outer = child
    while isinstance(child, Adapted):
        held = child.site.name.rpartition(".")[2] if isinstance(child.site, ParameterSite) else None
        if held == parameter:
            return child
        child = child.base_layer
    site = None
    if parameter is not None:
        depth = 0
        inner = outer
        while isinstance(inner, Adapted):
            depth, inner = depth + 1, inner.base_layer
        site = parameter_site(outer, "base_layer." * depth + parameter)
    wrapper = Adapted(outer, switch, path, site)
    parent._modules[leaf] = wrapper
    return wrapper


def _parameter_places(root: nn.Module, names: Iterable[str]) -> list[tuple[str, str]]:
    """Module path and parameter name for every entry of `target_parameters`, sorted as the names are.

    Raises:
        TargetError: An entry matches nothing.
    """
    modules = dict(walk(root))
    places: list[tuple[str, str]] = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        found = [
            (path, leaf)
            for path, module in modules.items()
            if leaf in module._parameters and (path == owner or path.endswith("." + owner) or not owner)
        ]
        if not found:
            known = {f"{p.rpartition('.')[2]}.{q}" for p, module in modules.items() for q in module._parameters}
            raise TargetError(f"target_parameters: {name!r} matches no parameter.{nearest(name, known)}")
        places += found
    return places


def _copies(root: nn.Module, config: ModuleConfig, optional: Iterable[str]) -> dict[str, TrainedCopy]:
    """A trained copy for every module that `modules_to_save` names.

    Raises:
        TargetError: A name matches nothing, or one match lies within another.
    """
    modules = dict(walk(root))
    names = list(config.modules_to_save or [])
    chosen: dict[str, None] = {}
    for name in names:
        matches = [path for path in modules if path == name or path.endswith("." + name)]
        if not matches and name not in optional:
            leaves = {path.rpartition(".")[2] for path in modules}
            raise TargetError(f"modules_to_save: {name!r} matches no module.{nearest(name, leaves)}")
        chosen.update(dict.fromkeys(matches))
    if getattr(config, "ensure_weight_tying", False):
        for path in list(chosen):
            chosen.update(dict.fromkeys(tied_modules(modules, path)))
    else:
        warn_if_tied(modules, list(chosen))
    for path in chosen:
        outer = next((other for other in chosen if path.startswith(other + ".")), None)
        if outer is not None:
            raise TargetError(f"modules_to_save: {path} lies within {outer}, which is trained whole. Name one of them.")
    return {path: TrainedCopy(modules[path], config) for path in chosen}


def _tie(root: nn.Module, copies: list[TrainedCopy], paths: list[str]) -> None:
    """Makes copies of modules that share a parameter share its copy."""
    modules = dict(walk(root))
    first: dict[int, nn.Parameter] = {}
    for path, trained in zip(paths, copies, strict=True):
        for name, parameter in modules[path]._parameters.items():
            if parameter is not None:
                own = trained.module._parameters[name]
                assert own is not None
                trained.module._parameters[name] = first.setdefault(id(parameter), own)


def set_trainable(root: nn.Module, names: Iterable[str], *, trainable: bool = True) -> None:
    """Lets the named adapters be trained and freezes all others.

    Raises:
        StateError: A name is not there.
    """
    chosen = set(names)
    seen: set[str] = set()
    for wrapper in wrappers(root):
        for name, adapter in wrapper.adapters.items():
            seen.add(name)
            wanted = trainable and name in chosen
            for parameter in adapter.parameters():
                if parameter.requires_grad != wanted and parameter.is_floating_point():
                    parameter.requires_grad_(wanted)
    if missing := chosen - seen:
        missing_name = sorted(missing)[0]
        raise StateError(f"There is no adapter {missing_name!r}.{nearest(missing_name, seen)} Loaded: {sorted(seen)}.")


def untie(root: nn.Module) -> None:
    """Records in the model's configuration that a merge has given tied embeddings different weights."""
    config = getattr(root, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    inputs, outputs = root.get_input_embeddings(), root.get_output_embeddings()  # type: ignore[operator]
    if inputs is None or outputs is None or inputs.weight is outputs.weight:
        return
    if torch.equal(inputs.weight, outputs.weight):
        outputs.weight = inputs.weight
        return
    config.tie_word_embeddings = False  # type: ignore[union-attr]
    warnings.warn(
        "The merged input and output embeddings differ now, so they are no longer tied: "
        "config.tie_word_embeddings was set to False, and a saved model keeps both.",
        VeneerWarning,
        stacklevel=3,
    )
