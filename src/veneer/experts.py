"""Trained adapters within another adapter, which combines them: the second of two stages.

The combining adapter holds one expert of each name at every place of its own. Experts are frozen (their tensors are
buffers) unless the configuration says otherwise, and they are written into the combining adapter's file, so that it
needs nothing besides. What they are made from is a folder each, read when the adapter is new, or adapters that are on
the model already (`veneer.combine.fuse`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Adapter, Base, Shared
from veneer.config import ModuleConfig, PeftConfig
from veneer.errors import CheckpointError, ConfigError, TargetError
from veneer.method_strings import parse_method
from veneer.products import LowRank
from veneer.sites import Site


class Known(Base):
    """What lies below an expert, where its output is known already.

    Args:
        base: What lies below.
        y: Its output.
    """

    def __init__(self, base: Base, y: Tensor) -> None:
        super().__init__(base.layer, base.site, base.below, base.args, base.kwargs, base.inputs)
        self.y = y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y

    def plus(self, x: Tensor, matrix: LowRank, dropout: float = 0.0) -> Tensor:
        site: Any = self.site
        if x.is_floating_point():
            x = F.dropout(x.to(matrix.down.device, matrix.down.dtype), dropout)
        return site.add_factored(x, self.y, matrix.down, matrix.up, matrix.scale)


def freeze(module: nn.Module) -> None:
    """Makes buffers of all parameters."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())


class Sources(Shared):
    """The tensors of the folders that the configuration names, for the experts of all places."""

    def __init__(self, sites: Mapping[str, Site], config: ExpertsConfig) -> None:
        super().__init__(sites, config)
        self.config = config
        self.sites = dict(sites)
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def reset(self) -> None:
        """Reads the folders.

        Raises:
            CheckpointError: A file is missing or damaged, or has tensors for places that are none here.
            BaseMismatchError: An adapter was trained on another base model.
        """
        from veneer import checkpoint, legacy

        for name, folder in self.config.adapters.items():
            saved, tensors, header = legacy.load(folder)
            checkpoint.check_weights(header, self.sites, folder)
            heads = tuple(getattr(saved, "modules_to_save", None) or ())
            self.tensors[name] = {}
            for key, tensor in tensors.items():
                path = key.removeprefix(checkpoint.PREFIX)
                if any(path.startswith(place + ".") for place in self.sites):
                    self.tensors[name][path] = tensor
                elif not any(f".{head}." in f".{path}" for head in heads):
                    raise CheckpointError(
                        f"{folder} has {key}, which belongs to no place of the combination ({len(self.sites)} places, "
                        f"such as {next(iter(self.sites))}). Target the same modules as the adapter was trained on."
                    )

    def at(self, path: str) -> dict[str, dict[str, Tensor]]:
        """The tensors of every expert that a folder was read for at one place, handed out once."""
        start = f"{path}."
        return {
            name: {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
            for name, tensors in self.tensors.items()
        }


class Combined(Adapter):
    """A place with an expert of every name; subclasses say how they are combined.

    Raises:
        ConfigError: An expert is of a method that cannot be one.
        TargetError: An expert's method does not make sense on this layer.
    """

    kinds = frozenset({"linear"})
    shares = Sources
    shared: Sources
    site: Site

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Adapter:
        return cls(module, site, config)  # type: ignore[arg-type]

    def __init__(self, module: nn.Module, site: Site, config: ExpertsConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.module = [module]  # in a list, so that it is no submodule
        self.experts = nn.ModuleDict({name: self.expert(name, expert) for name, expert in config.experts.items()})
        if not config.trains_experts:
            freeze(self.experts)

    def expert(self, name: str, config: Any) -> Adapter:
        """A new expert for this place."""
        method: type[Adapter] = config.method()
        if self.site.kind not in method.kinds:
            raise TargetError(f"The expert {name!r} ({method.__name__}) does not adapt {self.site.kind} layers.")
        return method.build(self.module[0], self.site, config)

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.path = path

    def reset(self) -> None:
        given = self.shared.at(self.path)
        for name, expert in self.experts.items():
            if name in given:
                self.fill(name, given[name])
            else:
                expert.reset()  # type: ignore[operator]

    def fill(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors of a trained adapter over.

        Raises:
            CheckpointError: They are not those of the expert's method.
        """
        expert: Any = self.experts[name]
        expected = self.expert(name, self.config.experts[name]).to_file()
        if {k: t.shape for k, t in expected.items()} != {k: t.shape for k, t in tensors.items()}:
            raise CheckpointError(
                f"{self.path}: the expert {name!r} expects {[f'{k} {tuple(t.shape)}' for k, t in expected.items()]}, "
                f"but was given {[f'{k} {tuple(t.shape)}' for k, t in tensors.items()] or 'nothing'}."
            )
        expert.from_file(tensors)

    def outputs(self, x: Tensor, y: Tensor, base: Base) -> list[Tensor]:
        """What every expert adds to the layer's output y."""
        known = Known(base, y)
        return [expert(x, known) - y for expert in self.experts.values()]

    def to_file(self) -> dict[str, Tensor]:
        experts = {f"experts.{name}": tensor for name, tensor in self.experts.state_dict(keep_vars=True).items()}
        own = {name: t for name, t in super().to_file().items() if not name.startswith("experts.")}
        return {**own, **experts}


@dataclass
class ExpertsConfig(ModuleConfig):
    """What configurations of combining methods say.

    Args:
        adapters: Folders of the trained adapters, by the names that they are to have, or a list, where the names are
            those of the folders. Read when the adapter is new.
        experts: Their configurations, written into the file; or method strings of new ones.

    Raises:
        ConfigError: There are none, a name is given twice, or an adapter is of a method that cannot be combined.
    """

    trains_experts = False
    """Whether the experts are trained along."""

    adapters: Any = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.adapters, str):
            raise ConfigError(f"{type(self).__name__}: adapters={self.adapters!r}; write a list: [{self.adapters}].")
        if not isinstance(self.adapters, Mapping):
            named = [(Path(folder).name, str(folder)) for folder in self.adapters or ()]
            if len(dict(named)) < len(named):
                raise ConfigError(
                    f"{type(self).__name__}: adapters={self.adapters!r} names several folders alike. Give names: "
                    "{first: folder, second: folder}."
                )
            self.adapters = dict(named)
        if bad := [name for name in {**self.adapters, **self.experts} if not name or set(name) & set("./")]:
            raise ConfigError(f"{type(self).__name__}: {bad[0]!r} cannot name an adapter: it is empty, or has a dot.")
        self.experts = {name: self._expert(name, given) for name, given in self.experts.items()}

    def _expert(self, name: str, given: Any) -> ModuleConfig:
        """An expert's configuration, from a file's values, a method string or itself."""
        from_file = isinstance(given, Mapping) and "peft_type" in given
        config: Any = PeftConfig.from_dict(given, f"experts.{name}") if from_file else parse_method(given)
        where = f"{type(self).__name__}: the adapter {name!r} ({config.peft_type})"
        if not isinstance(config, ModuleConfig) or config.method().shares is not None or config.companions():
            raise ConfigError(f"{where} is more than what stands at its places, so it cannot be combined here.")
        if getattr(config, "bias", "none") != "none" or config.target_parameters:
            raise ConfigError(f"{where} trains biases or bare parameters beside layers, which cannot be combined here.")
        return config

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        from veneer import legacy
        from veneer.targets import exactly, match

        experts = dict(self.experts)
        for name in self.adapters.keys() - experts.keys():
            experts[name] = replace(legacy.load(self.adapters[name], model=root)[0], inference_mode=True)
        if not experts:
            raise ConfigError(
                f"{type(self).__name__}: there is nothing to combine. Name folders of trained adapters: "
                "adapters=[folder, folder]."
            )
        config = replace(self, experts={name: experts[name] for name in {**self.adapters, **experts}})
        places = {
            name: match(root, replace(expert, modules_to_save=None), strict=False, modules=modules)
            for name, expert in config.experts.items()
            if expert.target_modules is not None
        }
        if not places:
            return config
        first = next(iter(places))
        wanted = places[first] if config.target_modules is None else match(root, config, strict=False, modules=modules)
        for name, found in places.items():
            if strange := set(wanted).symmetric_difference(found):
                raise TargetError(
                    f"{type(self).__name__}: the adapter {name!r} is on {len(found)} modules and {first!r} on "
                    f"{len(places[first])}; {min(strange)} is not adapted by all. Combine adapters of the same targets."
                )
        return replace(config, target_modules=exactly(wanted, modules))

    def to_dict(self) -> dict[str, Any]:
        experts = {name: expert.to_dict() for name, expert in self.experts.items()}
        return {**super().to_dict(), "experts": experts}

    def at(self, path: str) -> Self:
        here = super().at(path)
        return replace(here, experts={name: expert.at(path) for name, expert in here.experts.items()})
