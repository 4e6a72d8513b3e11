"""Modules that are trained as a whole, in a copy of their own for each adapter: new heads, embeddings, norms.

The copy stands beside the frozen module as any other adapter does, so it is switched, disabled, mixed, merged and saved
like one. `modules_to_save` in a configuration names such modules.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from veneer.adapted import Adapted
from veneer.adapter import Adapter, Base
from veneer.config import ModuleConfig, PeftConfig
from veneer.errors import TargetError, VeneerWarning, nearest
from veneer.stores import quantised_store


class TrainedCopy(Adapter):
    """Runs its own copy of the module in the module's place.

    Trains: every parameter of the copy, in float32 where the model's type is a shorter one.
    Start: equals the frozen module exactly. Merge: exact.
    """

    def __init__(self, module: nn.Module, config: PeftConfig) -> None:
        super().__init__(None, config)
        self.module = unwrapped_copy(module)
        for path, layer in self.module.named_modules():
            if quantised_store(layer) is not None:
                raise TargetError(
                    f"modules_to_save: {path or 'the module'} is a quantised {type(layer).__name__}, and codes cannot "
                    "be trained. Leave the module out of the quantisation, or put an adapter on it."
                )
        for parameter in self.module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        weight = next(self.module.parameters(), x)
        inner = x.to(weight.dtype) if x.is_floating_point() else x
        y = self.module(inner, *base.args, **base.kwargs)
        if isinstance(y, tuple):
            y, base.rest = y[0], y[1:]
        return y.to(x.dtype) if x.is_floating_point() else y

    def merge_into(self, layer: nn.Module) -> nn.Module:
        dtype = next(layer.parameters()).dtype
        return copy.deepcopy(self.module).to(dtype).requires_grad_(False)

    def to_file(self) -> dict[str, Tensor]:
        return {name.removeprefix("module."): tensor for name, tensor in self.state_dict().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in dict(self.module.named_parameters()):
                self.put(f"module.{name}", tensor)
            else:
                with torch.no_grad():
                    self.module.get_buffer(name).copy_(tensor)


def unwrapped_copy(module: nn.Module) -> nn.Module:
    """A deep copy of the module without the wrappers that stand within it."""
    twin = copy.deepcopy(module)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            while isinstance(child, Adapted):
                child = child.frozen_layer
            parent._modules[name] = child
    return twin


def tied_modules(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Paths of the other modules that hold one of this module's own parameters."""
    own = {id(parameter) for parameter in modules[path]._parameters.values() if parameter is not None}
    return [
        other
        for other, module in modules.items()
        if other != path and any(id(parameter) in own for parameter in module._parameters.values())
    ]


def warn_if_tied(modules: Mapping[str, nn.Module], saved: list[str]) -> None:
    """Says so where a module is trained alone that shares its weight with one that stays frozen."""
    for path in saved:
        left = [other for other in tied_modules(modules, path) if other not in saved]
        if left:
            warnings.warn(
                f"{path} shares its weight with {', '.join(left)}. The adapter trains a copy for {path} only; the "
                "others keep the frozen weight. Set ensure_weight_tying=True to train one copy for all of them.",
                VeneerWarning,
                stacklevel=4,
            )


def copies_of(
    modules: Mapping[str, nn.Module], config: ModuleConfig, optional: Iterable[str]
) -> dict[str, TrainedCopy]:
    """A trained copy for every module that `modules_to_save` names.

    Raises:
        TargetError: A name matches nothing, or one match lies within another.
    """
    names = list(config.modules_to_save or [])
    chosen: dict[str, None] = {}
    for name in names:
        matches = [path for path in modules if path.endswith(name)]  # as in `peft`, also within a word
        if not matches and name not in optional:
            leaves = {path.rpartition(".")[2] for path in modules}
            raise TargetError(f"modules_to_save: {name!r} matches no module.{nearest(name, leaves)}")
        chosen.update(dict.fromkeys(matches))
    if getattr(config, "ensure_weight_tying", False):
        tied = [other for path in chosen for other in tied_modules(modules, path)]
        if not tied and not config.companions():
            warnings.warn(
                "ensure_weight_tying=True ties nothing: no module of modules_to_save shares its weight with another.",
                VeneerWarning,
                stacklevel=4,
            )
        chosen.update(dict.fromkeys(tied))
    else:
        warn_if_tied(modules, list(chosen))
    for path in chosen:
        outer = next((other for other in chosen if path.startswith(other + ".")), None)
        if outer is not None:
            raise TargetError(f"modules_to_save: {path} lies within {outer}, which is trained whole. Name one of them.")
    return {path: TrainedCopy(modules[path], config) for path in chosen}


def tie_copies(modules: Mapping[str, nn.Module], copies: Mapping[str, TrainedCopy]) -> None:
    """Makes copies of modules that share a parameter share its copy."""
    first: dict[int, nn.Parameter] = {}
    for path, trained in copies.items():
        for name, parameter in modules[path]._parameters.items():
            if parameter is not None:
                own = trained.module._parameters[name]
                assert own is not None
                trained.module._parameters[name] = first.setdefault(id(parameter), own)
