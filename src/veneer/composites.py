"""Several methods under one name, each on places of its own: a method that is made of others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Base, Shared
from veneer.config import ModuleConfig
from veneer.errors import ConfigError, TargetError
from veneer.sites import Site
from veneer.targets import match


class Parts(Shared):
    """What the places of each part have in common, by the name of the part."""

    def __init__(self, sites: Mapping[str, Site], config: CompositeConfig) -> None:
        super().__init__(sites, config)
        self.parts = nn.ModuleDict()
        for name, (part, paths) in config.made.items():
            shares = part.method().shares
            if shares is not None:
                self.parts[name] = shares({path: site for path, site in sites.items() if path in paths}, part)

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(f"{name}.{key}" for name, part in self.parts.items() for key in part.optional)  # type: ignore[union-attr]

    def reset(self) -> None:
        for part in self.parts.values():
            part.reset()  # type: ignore[operator]

    def to_file(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": t for name, part in self.parts.items() for key, t in part.to_file().items()}  # type: ignore[operator]

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, part in self.parts.items():
            start = f"{name}."
            part.from_file({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})  # type: ignore[operator]


class Part(Adapter):
    """A place of a composite, where one of its parts stands."""

    kinds = frozenset({"linear", "module"})
    shares = Parts
    shared: Parts
    starts_as_base = False

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Adapter:
        return cls(module, site, config)

    def __init__(self, module: nn.Module, site: Site | None, config: CompositeConfig) -> None:
        super().__init__(site, config)
        self.name, part = config.here
        method: type[Adapter] = part.method()
        kind = "module" if site is None else site.kind
        if method.kinds and kind not in method.kinds:
            raise TargetError(f"The part {self.name!r} ({method.__name__}) does not adapt {type(module).__name__}.")
        self.inner = method.build(module, site, part)
        self.splits_rows = self.inner.splits_rows  # type: ignore[misc]

    @property
    def device(self) -> torch.device | None:
        return self.inner.device

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.optional

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        if self.name in self.shared.parts:
            self.inner.join(self.shared.parts[self.name], path)  # type: ignore[arg-type]

    def reset(self) -> None:
        self.inner.reset()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.inner(x, base)

    def to_file(self) -> dict[str, Tensor]:
        return self.inner.to_file()

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.inner.from_file(tensors)


@dataclass
class CompositeConfig(ModuleConfig):
    """What configurations of composites say; their places are those of their parts.

    Args:
        made: The parts on a model, each with its paths; filled in, and in no file.

    Raises:
        ConfigError: Places are named.
        TargetError: Two parts would adapt the same place.
    """

    made: Any = field(default_factory=dict, repr=False, compare=False, metadata={"internal": True})

    def parts(self) -> dict[str, ModuleConfig]:
        """The configurations of the parts."""
        raise NotImplementedError

    @property
    def here(self) -> tuple[str, Any]:
        """Name and configuration of the part at the path that `at` was asked for."""
        return vars(self)["_here"]

    def at(self, path: str) -> Self:
        here = copy.copy(self)
        name, part = next((name, part) for name, (part, paths) in self.made.items() if path in paths)
        vars(here)["_here"] = name, part.at(path)
        return here

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        made: dict[str, Any] = {}
        taken: dict[str, str] = {}
        for name, given in self.parts().items():
            part = given.on(root, modules)
            paths = frozenset(match(root, part, strict=False, modules=modules))
            if both := paths & taken.keys():
                raise TargetError(
                    f"{type(self).__name__}: {min(both)} would be adapted by {taken[min(both)]} and {name}."
                )
            made[name], taken = (part, paths), taken | dict.fromkeys(paths, name)
        targets = [path for path in modules if path in taken]
        if self.target_modules not in (None, targets) or self.exclude_modules or self.layers_to_transform is not None:
            raise ConfigError(
                f"{type(self).__name__} is where its parts are. Leave target_modules, exclude_modules and "
                "layers_to_transform out."
            )
        return replace(self, made=made, target_modules=targets)

    def to_dict(self) -> dict[str, Any]:
        values = ModuleConfig.to_dict(replace(self, made={}))
        return {name: value for name, value in values.items() if name != "made"}
