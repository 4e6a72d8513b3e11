"""Full fine-tuning as a method: the layers' own weights are trained, in a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from veneer import targets
from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig
from veneer.errors import UnsupportedError
from veneer.registry import register
from veneer.sites import Site, site_of


class Weight(nn.Module):
    """A trained weight, as the layer stores it; layers that share one hold it together."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(like.shape))


class Full(WeightAdapter):
    r"""Trains a copy of the layer's weight and bias in their place.

        W' = V,     b' = c

    Trains: V, as the layer stores it, and c, the layer's own at the start. Layers that share a weight share its copy.
    Cost: as many parameters as the layers have. A copy, not a delta, so that weight decay pulls where it does in
    ordinary fine-tuning.
    Start: equals the base layer exactly. Merge: exact. What lies below it in a stack is replaced.
    Source: the baseline of every paper here.
    """

    kinds = frozenset({"linear", "conv", "embedding", "norm", "parameter"})
    ties = True

    def __init__(self, site: Site, config: FullConfig) -> None:
        super().__init__(site, config)
        bias = site.bias()
        self.follows = False
        self.held = Weight(site.store.outline(site.module, site.name))
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias.shape))

    def tie(self, first: Self) -> None:
        self.held, self.follows = first.held, True

    @torch.no_grad()
    def reset(self) -> None:
        self.held.weight.copy_(self.site.unview(self.site.read()))
        if self.bias is not None:
            self.bias.copy_(self.site.bias())  # type: ignore[arg-type]

    def adapt(self, weight: Tensor) -> Tensor:
        return self.site.view(self.held.weight)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        return self.bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.site.apply(x, self.site.view(self.held.weight), self.bias, base.args, base.kwargs)

    def to_file(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        if not self.follows:
            tensors[self.site.name.rpartition(".")[2]] = self.held.weight
        if self.bias is not None:
            tensors["bias"] = self.bias
        return tensors

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.put("bias" if name == "bias" and self.bias is not None else "held.weight", tensor)


@register("full")
@dataclass
class FullConfig(ModuleConfig):
    """Configuration of `Full`.

    `target_modules=None` trains all parameters of the model: those of layers as `Full` does, and modules that hold
    other parameters of their own as whole copies (`modules_to_save`).

    Raises:
        UnsupportedError: The model itself, and none of its modules, holds a parameter.
    """

    adapter = Full
    peft_name = "FULL"
    learning_rates = {"classification": 5e-5, "causal-lm": 2e-5}  # noqa: RUF012  # read only

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.target_modules is not None or self.target_parameters:
            return self
        return self.within(root, modules, list(modules))

    def within(self, root: nn.Module, modules: Mapping[str, nn.Module], paths: list[str]) -> Self:
        """This configuration for all parameters of these modules.

        Raises:
            UnsupportedError: As above.
        """
        if own := [name for name, parameter in root._parameters.items() if parameter is not None]:
            raise UnsupportedError(
                f"{type(root).__name__} holds {', '.join(own)} itself, and only modules within a model can be adapted. "
                "Name the modules to train in target_modules."
            )
        layers = [path for path in paths if _holds_parameters(modules[path]) and site_of(modules[path]) is not None]
        whole = [path for path in paths if _holds_parameters(modules[path]) and path not in layers]
        whole = [path for path in whole if not any(path.startswith(other + ".") for other in whole)]
        layers = [path for path in layers if not any(path.startswith(other + ".") for other in whole)]
        copies = [*(self.modules_to_save or []), *whole]
        return replace(self, target_modules=targets.exactly(layers, modules), modules_to_save=copies or None)


def _holds_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())
