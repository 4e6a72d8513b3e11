"""A model made deeper by running some of its layers more than once, each time with adapters of its own.

The repeated layers share their weights with the originals, so that the deeper model takes no more memory. The model
itself is left as it was: what stood in the place of the new list of layers is put back by `restore`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from veneer.adapted import wrappers
from veneer.errors import ConfigError, TargetError, UnsupportedError
from veneer.structure import blocks
from veneer.targets import walk

Ranges = list[list[int]]


class Replicated(nn.ModuleList):
    """Layers of a model in another number and order.

    Attributes:
        ranges: Start and end of each run of layers.
        config: Configuration of the model.
        changed: Its fields as they were.
    """

    ranges: Ranges
    config: Any
    changed: dict[str, Any]
    _original: list[nn.ModuleList]

    @classmethod
    def of(cls, original: nn.ModuleList, ranges: Ranges, order: Sequence[int]) -> Replicated:
        """The layers of `original` by their indices; slices of lists are made without these arguments."""
        layers = cls([_twin(original[index]) for index in order])
        layers.ranges = ranges
        layers._original = [original]  # in a list, so that it is no submodule
        for index, layer in enumerate(layers):
            for module in layer.modules():
                if "layer_idx" in vars(module):  # by which caches know a layer
                    vars(module)["layer_idx"] = index
        return layers

    @property
    def original(self) -> nn.ModuleList:
        return self._original[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Replicated:
        super()._apply(fn, recurse)
        self.original._apply(fn)  # layers that are left out follow the model to another device or type
        return self


@contextmanager
def replicated(root: nn.Module, config: Any) -> Iterator[None]:
    """Gives the model the layers that an adapter's configuration asks for; if what is done then fails, takes them back.

    Raises:
        ConfigError: The ranges are not within the model's layers, or other adapters lie on other layers.
        TargetError: The model has no list of layers, or several.
        UnsupportedError: A layer is placed by accelerate, whose hooks cannot be shared.
    """
    wanted: Ranges | None = getattr(config, "layer_replication", None)
    present = next((layers.ranges for _, _, layers in _found(root)), None)
    if wanted == present:
        yield
        return
    if present is not None or next(wrappers(root), None) is not None:
        raise ConfigError(
            f"layer_replication={wanted}, but the adapters that the model has lie on "
            f"{'its own layers' if present is None else f'layers replicated as {present}'}. Give the same "
            "layer_replication, or unload the others first."
        )
    assert wanted is not None
    _replicate(root, wanted)
    try:
        yield
    except Exception:
        restore(root)
        raise


def restore(root: nn.Module) -> None:
    """Puts the model's own layers back."""
    for parent, name, layers in list(_found(root)):
        parent._modules[name] = layers.original.train(layers.training)
        for field, value in layers.changed.items():
            setattr(layers.config, field, value)


def settle(root: nn.Module) -> None:
    """Makes the new layers the model's own, each with weights of its own, so that it can be saved."""
    for parent, name, layers in list(_found(root)):
        seen: set[int] = set()
        for layer in layers:
            for module in layer.modules():
                for table in (module._parameters, module._buffers):
                    for key, tensor in table.items():
                        if tensor is not None and id(tensor) in seen:
                            table[key] = _copy(tensor)  # type: ignore[assignment]
            seen |= {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
        parent._modules[name] = nn.ModuleList(layers)


def _replicate(root: nn.Module, ranges: Ranges) -> None:
    modules = {"": root, **dict(walk(root))}
    paths = list(dict.fromkeys(block.rpartition(".")[0] for block in blocks(modules)))
    if len(paths) != 1:
        raise TargetError(
            f"layer_replication: one list of layers was expected in {type(root).__name__}, found "
            f"{', '.join(paths) or 'none'}."
        )
    above, _, name = paths[0].rpartition(".")
    layers: Any = modules[paths[0]]
    if any(end > len(layers) for _, end in ranges):
        raise ConfigError(f"layer_replication={ranges}, but the model has {len(layers)} layers.")
    if any(hasattr(module, "_hf_hook") for module in layers.modules()):
        raise UnsupportedError("layer_replication: the layers are placed by accelerate. Load without device_map.")
    order = [index for start, end in ranges for index in range(start, end)]
    parent = modules[above]
    config: Any = getattr(parent, "config", None) or getattr(root, "config", None)
    changed = _reordered(config, order, len(layers))
    replicas = Replicated.of(layers, ranges, order)
    replicas.config, replicas.changed = config, {field: getattr(config, field) for field in changed}
    parent._modules[name] = replicas
    for field, value in changed.items():
        setattr(config, field, value)


def _reordered(config: Any, order: Sequence[int], count: int) -> dict[str, Any]:
    """Fields of the model's configuration that speak of its layers, as they are for the new ones."""
    if config is None:
        return {}
    changed: dict[str, Any] = {"num_hidden_layers": len(order)} if hasattr(config, "num_hidden_layers") else {}
    for field, value in vars(config).items():
        if field.endswith(("_layers", "layer_types")) and isinstance(value, list) and len(value) == count:
            changed[field] = [value[index] for index in order]
    return changed


def _twin(module: nn.Module) -> nn.Module:
    """A module of its own that shares all tensors."""
    twin = copy.copy(module)
    twin.__dict__ = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    return twin


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _found(root: nn.Module) -> Iterator[tuple[nn.Module, str, Replicated]]:
    for module in root.modules():
        for name, child in module._modules.items():
            if isinstance(child, Replicated):
                yield module, name, child
