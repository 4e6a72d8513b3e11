"""Putting adapters on a model and taking them off: nothing is changed before everything has been checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from veneer.adapted import Adapted, Switch, adapters_of, wrappers
from veneer.adapter import Adapter, BiasOnly, Shared
from veneer.config import ModuleConfig, PeftConfig
from veneer.errors import ConfigError, TargetError, UnsupportedError, VeneerWarning, nearest
from veneer.sites import ParameterSite, Site, parameter_site, site_of
from veneer.stores import quantised_store
from veneer.targets import match, resolve, walk
from veneer.trained_copy import copies_of, tie_copies, tied_modules

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
        UnsupportedError: Adapters would have to be tied.
    """
    check_name(name, root)
    if not isinstance(config, ModuleConfig) or config.adapter is None:
        raise ConfigError(f"{type(config).__name__} describes no method that attaches to modules.")
    method: type[Adapter] = config.method()
    below = dict(walk(root))
    modules = {"": root, **below}
    config = config.on(root, below)
    places: list[Place] = []
    parameters = getattr(config, "target_parameters", None)
    only_copies = config.target_modules == [] and config.modules_to_save
    if config.target_modules or not (parameters or only_copies):
        config = replace(config, target_modules=resolve(root, config, below))
        places += [(path, None) for path in match(root, config, strict=start, modules=below)]
    places += _parameter_places(below, parameters or ())
    places += _followers(below, places, config, places)
    if getattr(config, "ensure_weight_tying", False):
        _refuse_tied(below, places)
    if start:
        for said in config.unused([_path(place) for place in places]):
            warnings.warn(f"{type(root).__name__}: {said}", VeneerWarning, stacklevel=4)
    config = config.resolved(below, [_path(place) for place in places])
    with torch.device("cpu" if start else "meta"):
        planned: list[tuple[Place, Adapter]] = [(place, _build(modules, place, method, config)) for place in places]
        shared = _share(method, planned, config)
        planned += _companions(root, modules, config, planned, start)
    _tie_adapters(adapter for _, adapter in planned)
    more = _biases(below, config, dict(planned), start)
    for (path, _), adapter in [*planned, *more]:
        _fit(adapter, modules[path], autocast)
    if start:
        if shared is not None:
            shared.reset()
        for _, adapter in planned:
            adapter.prepared = not (isinstance(adapter, method) and method.needs_data(config))
            adapter.reset()
    copies = copies_of(below, config, optional_copies)
    for path, copy in copies.items():
        _fit(copy, modules[path], autocast)
    for place, adapter in [*planned, *more, *(((path, None), copy) for path, copy in copies.items())]:
        wrapper = _wrapper_at(modules, place, switch, adapter.site)
        if adapter.site is not None:
            # Adapters of one place share its view; that of a bare parameter reaches through the wrappers of others.
            adapter.site = wrapper.site
        if adapter.sees_others:
            adapter.others = [wrapper.adapters]  # type: ignore[assignment]  # in a list, so that it is no submodule
        wrapper.adapters[name] = adapter
    if getattr(config, "ensure_weight_tying", False):
        tie_copies(modules, copies)
    return config


def check_name(name: str, root: nn.Module) -> None:
    """Refuses adapter names that are taken or cannot name a module.

    Raises:
        ConfigError: So.
    """
    if any(True for _ in adapters_of(root, name)):
        raise ConfigError(f"An adapter named {name!r} is already there. Delete it first, or choose another name.")
    if not name or set(name) & set("./\\") or name.startswith("_") or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: it names modules and a folder, so it may not be empty, contain a "
            "dot or a slash, start with an underscore, or be a method of torch.nn.ModuleDict such as 'keys'."
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


def _build(modules: Mapping[str, nn.Module], place: Place, cls: type[Adapter], config: ModuleConfig) -> Adapter:
    """The adapter for a place, not yet on the model.

    Raises:
        TargetError: The method cannot adapt what is there.
        ConfigError: Its settings do not fit what is there.
    """
    path, parameter = place
    module, parent = modules[path], modules[path.rpartition(".")[0]]
    site: Site | None = site_of(module) if parameter is None else parameter_site(module, parameter)
    if (cls.kinds or parameter is not None) and ("module" if site is None else site.kind) not in cls.kinds:
        what = f"a {site.kind} layer" if site is not None else "no layer with a weight that is known"
        kinds = ", ".join(sorted(cls.kinds)) or "outputs of"
        raise TargetError(
            f"{path} is a {type(module).__name__}, {what}; {cls.__name__} adapts {kinds} "
            "layers. Narrow `target_modules`, or name the module in `exclude_modules`."
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise TargetError(
            f"{path}: torch.nn.MultiheadAttention reads the weight of this layer without calling it, so an adapter "
            "there would have no effect. "
            + (
                f"Target the tensor itself: target_parameters=['{path}.weight']."
                if parameter is None
                else "Put the attention into a module, so that the attention as a whole can be wrapped."
            )
        )
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fused inference kernel reads the weights of its layers without calling them.
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        return cls.build(module, site, config.at(_path(place)))
    except ConfigError as error:
        raise ConfigError(f"{_path(place)}: {error}") from error


def _companions(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    config: ModuleConfig,
    planned: Iterable[tuple[Place, Adapter]],
    start: bool,
) -> list[tuple[Place, Adapter]]:
    """The adapters of what is attached beside the method.

    Raises:
        TargetError: The method adapts the same place.
    """
    below = {path: module for path, module in modules.items() if path}
    taken = {place for place, _ in planned}
    beside: list[tuple[ModuleConfig, list[Place]]] = []
    for companion in config.companions():
        companion = companion.on(root, below)
        chosen: list[Place] = [(path, None) for path in match(root, companion, strict=start, modules=below)]
        if twice := taken.intersection(chosen):
            raise TargetError(
                f"{_path(min(twice))} is adapted by {type(config).__name__} and by {type(companion).__name__} under "
                "one name. Leave it out of the targets of one of them, or use two adapters and activate both."
            )
        taken.update(chosen)
        beside.append((companion, chosen))
    for companion, chosen in beside:
        chosen += _followers(below, chosen, companion, taken)
    return [
        (place, _build(modules, place, method, companion))
        for companion, chosen in beside
        for method in [companion.method()]
        for place in chosen
    ]


def _followers(
    modules: Mapping[str, nn.Module], places: Iterable[Place], config: ModuleConfig, taken: Iterable[Place]
) -> list[Place]:
    """Places that are adapted because they have their weight from an embedding that is."""
    if not config.method().ties:
        return []
    known = {path for path, parameter in taken if parameter is None}
    here = [path for path, parameter in places if parameter is None]
    embeddings = [path for path in here if isinstance(modules[path], nn.Embedding)]
    followers = [other for path in embeddings for other in tied_modules(modules, path) if other not in known]
    for path in here:
        if left := [other for other in tied_modules(modules, path) if other not in known.union(followers)]:
            warnings.warn(
                f"{path} shares its weight with {', '.join(left)}, where the frozen weight stays in use. Target the "
                "embedding among them to train all of them as one.",
                VeneerWarning,
                stacklevel=5,
            )
    return [(path, None) for path in dict.fromkeys(followers)]


def _tie_adapters(adapters: Iterable[Adapter]) -> None:
    """Lets adapters of layers that share a weight train the same tensors, where the method wants it."""
    first: dict[int, Adapter] = {}
    for adapter in adapters:
        if adapter.ties and adapter.site is not None:
            module, name = adapter.site.module, adapter.site.name
            # A quantised layer may have no parameter of that name; it shares what it has with no other.
            weight = module if adapter.site.store.quantised else module.get_parameter(name)
            leader = first.setdefault(id(weight), adapter)
            if leader is not adapter:
                adapter.tie(leader)


def _path(place: Place) -> str:
    path, parameter = place
    return path if parameter is None else f"{path}.{parameter}"


def _share(method: type[Adapter], planned: Iterable[tuple[Place, Adapter]], config: ModuleConfig) -> Shared | None:
    """Gives the new adapters what they have in common."""
    if method.shares is None:
        return None
    paths = {_path(place): adapter for place, adapter in planned}
    shared = method.shares({path: adapter.site for path, adapter in paths.items() if adapter.site is not None}, config)
    for path, adapter in paths.items():
        adapter.join(shared, path)
    return shared


def _biases(
    modules: Mapping[str, nn.Module], config: ModuleConfig, planned: Mapping[Place, Adapter], start: bool
) -> list[tuple[Place, Adapter]]:
    """Lets biases be trained beside the method: those of adapted layers, with `bias="all"` of all others too.

    Returns:
        Adapters for the layers that have none yet.

    Raises:
        UnsupportedError: A bias cannot be adapted.
    """
    wanted = getattr(config, "bias", "none")
    if wanted == "none":
        return []
    more: list[tuple[Place, Adapter]] = []
    for path, module in modules.items():
        bias = getattr(module, "bias", None) if quantised_store(module) else module._parameters.get("bias")
        if bias is None:
            continue
        adapter = planned.get((path, None))
        if adapter is None and wanted == "all":
            site = site_of(module)
            if site is None:
                raise UnsupportedError(
                    f'bias="all": the bias of {path} ({type(module).__name__}) cannot be adapted. Train those of the '
                    f"adapted layers only, or name {path} in modules_to_save."
                )
            adapter = BiasOnly(site, config)
            more.append(((path, None), adapter))
        if adapter is not None:
            adapter.bias_delta = nn.Parameter(torch.zeros(bias.shape, device=None if start else "meta"))
    return more


def _fit(adapter: Adapter, module: nn.Module, autocast: bool) -> None:
    """Moves the adapter to where its layer computes, in the layer's type or float32."""
    site = adapter.site if adapter.site is not None else module.site if isinstance(module, Adapted) else site_of(module)
    like = next(module.parameters(), None) if site is None else None
    dtype = site.dtype if site is not None else like.dtype if like is not None else torch.get_default_dtype()
    if (autocast and dtype in (torch.float16, torch.bfloat16)) or not dtype.is_floating_point:
        dtype = torch.float32
    device = site.device if site is not None else like.device if like is not None else None
    if device is not None and device.type == "meta":
        device = None

    def fit(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(None if tensor.is_meta else device, wanted)  # without memory: filled later, where the layer is

    tensors = [*adapter.parameters(), *adapter.buffers()]
    if any(fit(tensor) is not tensor for tensor in tensors):
        adapter._apply(fit)


def _wrapper_at(modules: Mapping[str, nn.Module], place: Place, switch: Switch, site: Site | None) -> Adapted:
    """The wrapper for a place, put there if it is not yet."""
    path, parameter = place
    above, _, leaf = path.rpartition(".")
    parent = modules[above]
    child = parent._modules[leaf]
    assert child is not None
    outer, depth = child, 0
    while isinstance(child, Adapted):
        held = child.site.parameter if isinstance(child.site, ParameterSite) else None
        if held == parameter:
            return child
        child, depth = child.base_layer, depth + 1
    if parameter is not None:
        site = parameter_site(outer, "base_layer." * depth + parameter)
    wrapper = Adapted(outer, switch, path, site)
    parent._modules[leaf] = wrapper
    return wrapper


def _parameter_places(modules: Mapping[str, nn.Module], names: Iterable[str]) -> list[Place]:
    """Module path and parameter name of all that `target_parameters` matches, each once.

    Raises:
        TargetError: An entry matches nothing.
    """
    places: list[Place] = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        found: list[Place] = [
            (path, leaf)
            for path, module in modules.items()
            if leaf in module._parameters and (path == owner or path.endswith("." + owner) or not owner)
        ]
        if not found:
            known = {f"{p.rpartition('.')[2]}.{q}" for p, module in modules.items() for q in module._parameters}
            raise TargetError(f"target_parameters: {name!r} matches no parameter.{nearest(name, known)}")
        places += [_called(modules, place) for place in found]
    return list(dict.fromkeys(places))


def _called(modules: Mapping[str, nn.Module], place: Place) -> Place:
    """The place itself, or that of the module above which reads the parameter without calling the module it is in."""
    path, parameter = place
    above, _, leaf = path.rpartition(".")
    return (above, f"{leaf}.{parameter}") if isinstance(modules.get(above), nn.MultiheadAttention) else place


def _refuse_tied(modules: Mapping[str, nn.Module], places: Iterable[Place]) -> None:
    """Refuses adapters that would have to be tied.

    Raises:
        UnsupportedError: A place shares its weight with another module.
    """
    for path, parameter in places:
        if parameter is None and (others := tied_modules(modules, path)):
            raise UnsupportedError(
                f"ensure_weight_tying=True: {path} is adapted and shares its weight with {', '.join(others)}; adapters "
                "are not tied in this version. Name it in modules_to_save instead of target_modules, or leave "
                "ensure_weight_tying out to adapt it alone."
            )


def let_train(module: nn.Module, wanted: bool) -> None:
    """Whether the module's parameters are trained. Over the plain tables: `parameters()` takes ten times as long."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad != wanted and parameter.is_floating_point():
            parameter.requires_grad_(wanted)
    for child in module._modules.values():
        if child is not None:
            let_train(child, wanted)


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
