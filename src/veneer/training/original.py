"""A base model as it was loaded, to come back to after each of several runs on it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from veneer.errors import VeneerError


class Original:
    """Remembers what a run leaves on a model: wrappers, hooks, flags, settings, gradients; no tensor is copied.

    Weights are looked at too: torch counts the changes of each tensor in place. Hold it as long as the model.

    Args:
        model: The model, without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        # Tables of children, parameters, buffers and hooks are kept as they are and filled anew: handles refer to them.
        self._modules = [(module, _remembered(vars(module))) for module in model.modules()]
        self._settings = [(settings, _remembered(vars(settings))) for settings in _settings(model)]
        self._tensors = {
            name: (tensor, tensor.device, tensor._version, tensor.requires_grad)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }

    def restore(self) -> None:
        """Makes the model what it was.

        Raises:
            VeneerError: A weight was changed, which cannot be taken back.
        """
        for owner, values in [*self._modules, *self._settings]:
            present = vars(owner)
            present.clear()
            for name, (value, content) in values.items():
                if content is not None:
                    value.clear()
                    value.update(content)
                present[name] = value
        for tensor, device, _, trained in self._tensors.values():
            tensor.grad = None
            if tensor.requires_grad != trained:
                tensor.requires_grad_(trained)
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        changed = [name for name, (tensor, _, version, _) in self._tensors.items() if tensor._version != version]
        if changed:
            shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise VeneerError(
                f"The run changed the base model itself: {shown}. No other configuration can be trained on it. Train "
                "the method that does so alone, and the others together."
            )

    def forget(self, names: list[str]) -> None:
        """Gives weights other random values until the next `restore`, as another load of the model would."""
        modules = dict(self._modules[0][0].named_modules())
        for name in names:
            path, _, leaf = name.rpartition(".")
            table = modules[path]._parameters if path in modules else {}
            if (tensor := table.get(leaf)) is not None and tensor.is_floating_point():
                table[leaf] = nn.Parameter(torch.randn_like(tensor) / 10, requires_grad=False)


def _remembered(values: dict[str, Any]) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Each value, and what is in it where it is a table."""
    return {name: (value, copy.copy(value) if isinstance(value, dict) else None) for name, value in values.items()}


def _settings(model: nn.Module) -> list[Any]:
    """The configurations that modules hold, each once, those within others too."""
    found: dict[int, Any] = {}
    queue = [value for module in model.modules() for value in vars(module).values()]
    while queue:
        value = queue.pop()
        if isinstance(value, (PreTrainedConfig, GenerationConfig)) and id(value) not in found:
            found[id(value)] = value
            queue += vars(value).values()
    return list(found.values())
