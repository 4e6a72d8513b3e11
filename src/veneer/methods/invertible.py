"""Invertible adapters: embeddings are changed by a map that is undone before the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from veneer import structure, targets
from veneer.adapter import Adapter, Base, Shared
from veneer.config import ModuleConfig, check_positive
from veneer.errors import ConfigError, TargetError
from veneer.methods.bottleneck import ACTIVATIONS
from veneer.outputs import OutputAdapter
from veneer.registry import register
from veneer.sites import Site
from veneer.structure import is_encoder_decoder


class Coupling(Shared):
    """The two networks, for both ends of the model."""

    F: Any
    G: Any

    def __init__(self, sites: Mapping[str, Site], config: InvertibleConfig) -> None:
        super().__init__(sites, config)
        self.config = config
        self.width = 0  # not known yet

    def make(self, width: int) -> None:
        """Builds the networks for embeddings of this width, once.

        Raises:
            ConfigError: They are there already for another width.
        """
        if self.width:
            if width != self.width:
                raise ConfigError(
                    f"InvertibleConfig: {self.width} numbers are embedded and {width} come before the head. Leave the "
                    "head out of target_modules."
                )
            return
        self.width, self.cut = width, width // 2
        self.F, self.G = self._network(width - self.cut, self.cut), self._network(self.cut, width - self.cut)

    def _network(self, inputs: int, outputs: int) -> nn.Sequential:
        size = max(1, inputs // self.config.reduction)
        return nn.Sequential(
            nn.Linear(inputs, size), ACTIVATIONS[self.config.non_linearity](), nn.Linear(size, outputs)
        )

    def reset(self) -> None:
        for network in (self.F, self.G):
            nn.init.normal_(network[0].weight, std=0.02)
            for zero in (network[0].bias, network[2].weight, network[2].bias):
                nn.init.zeros_(zero)

    def to_file(self) -> dict[str, Tensor]:
        return {f"invertible_{name}": tensor for name, tensor in self.named_parameters()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file({name.removeprefix("invertible_"): tensor for name, tensor in tensors.items()})

    def there(self, x: Tensor) -> Tensor:
        """y from x, `(..., d)`."""
        first, second = x.split((self.cut, self.width - self.cut), -1)
        first = first + self.F(second)
        return torch.cat([first, second + self.G(first)], -1)

    def back(self, y: Tensor) -> Tensor:
        """x from y; the inverse of `there`."""
        first, second = y.split((self.cut, self.width - self.cut), -1)
        second = second - self.G(first)
        return torch.cat([first - self.F(second), second], -1)


class Invertible(OutputAdapter):
    r"""Changes what the embeddings give by an invertible map, and applies its inverse before the output embeddings.

        y_1 = x_1 + F(x_2),   y_2 = x_2 + G(y_1);     F, G two layers with a non-linearity between them

    x_1 and x_2 are the halves of a vector of width d. A model without output embeddings, such as one that classifies,
    has no inverse: there is no token to go back to.

    Trains: F, d/2 to d/4 to d/2, and G likewise, once; the second layers are zero at the start.
    Cost: d^2 / 2 + 3 d / 2 parameters with a reduction of 2.
    Start: equals the base model exactly. Merge: impossible, F and G are not linear.
    Raises: ConfigError where the head takes another width than the embeddings give.
    Source: Pfeiffer et al. 2020, arXiv:2005.00052, section 3.3.3; Dinh et al. 2015, arXiv:1410.8516 (NICE).
    """

    kinds = frozenset({"linear", "embedding", "module"})
    shares = Coupling
    shared: Coupling

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: InvertibleConfig) -> Adapter:
        return (Inverse if config.inverse_modules else cls)(module, site, config)

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.shared.make(self.width)

    def change(self, h: Tensor, x: Tensor) -> Tensor:
        return self.shared.there(h.to(self.dtype)).to(h.dtype)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.shared.F[0].weight.dtype
        return dtype


class Inverse(Invertible):
    """The way back, on the input of the head."""

    splits_rows = True

    def __init__(self, module: nn.Module, site: Site | None, config: Any) -> None:
        super().__init__(module, site, config)
        if site is None or site.kind != "linear":
            raise ConfigError(f"a {type(module).__name__} was named as the head. Name a linear layer.")
        self.width = site.shape[1]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(self.shared.back(x.to(self.dtype)).to(x.dtype))


@register("invertible")
@dataclass
class InvertibleConfig(ModuleConfig):
    """Configuration of `Invertible`.

    `target_modules=None` takes what embeds the tokens, and the output embeddings where the model has them.

    Args:
        inverse_modules: Those of the targets that take the inverse of their input: names, or an expression.
        reduction: Width of a half over that of the layer between.
        non_linearity: The function between the two layers.

    Raises:
        ConfigError: A reduction that is not positive.
        TargetError: The model has no embeddings that can be found, or several.
    """

    adapter = Invertible
    peft_name = "INVERTIBLE"
    default_targets = (["embedding-output"],)
    learning_rates = {"classification": 4e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only

    inverse_modules: list[str] | str | None = None
    reduction: int = 2
    non_linearity: Literal["relu", "gelu", "swish", "tanh", "leakyrelu"] = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "reduction")

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.target_modules is not None:
            return self
        if is_encoder_decoder(root):
            raise TargetError(
                f"InvertibleConfig: {type(root).__name__} embeds two texts. Name what is to be adapted in "
                "target_modules, and the head in inverse_modules."
            )
        (start,) = structure.place("embedding-output", modules, targets.input_embedding(root, modules))
        head = targets.output_embedding(root, modules)
        both = [start] if head is None else [start, head]
        inverse = None if head is None else targets.exactly([head], modules)
        return replace(self, target_modules=targets.exactly(both, modules), inverse_modules=inverse)

    def at(self, path: str) -> Self:
        reversed_here = self.inverse_modules is not None and targets.names(self.inverse_modules, path)
        return replace(super().at(path), inverse_modules=[path] if reversed_here else None)
