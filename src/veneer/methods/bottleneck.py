"""Bottleneck adapters: a small network with a residual connection, after attention and after the feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from veneer.adapter import Adapter, Base
from veneer.config import ModuleConfig
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import Site

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "swish": nn.SiLU, "tanh": nn.Tanh}


class Bottleneck(Adapter):
    r"""Passes the output of a module through a narrow layer and adds it back.

        h' = h + s (up f(down h + b_down) + b_up),     h the module's output, before residual sum and norm

    Trains: down (m, d), up (d, m), zero at the start, and both biases.
    Cost: 2 m d + m + d parameters a place; m = d / reduction.
    Start: equals the base module exactly. Merge: impossible, f is not linear.
    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 (both places); Pfeiffer et al. 2021, arXiv:2005.00247
    (after the feed-forward part only).
    """

    kinds = frozenset({"linear"})

    def __init__(self, site: Site, config: BottleneckConfig) -> None:
        super().__init__(site, config)
        width = site.shape[0]
        size = config.bottleneck_size or max(1, width // config.reduction)
        self.scaling = config.scaling
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.activation = ACTIVATIONS[config.non_linearity]()
        self.dropout = nn.Dropout(config.dropout)

    def reset(self) -> None:
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h = base(x)
        inner = self.dropout(self.activation(self.down(h.to(self.down.weight.dtype))))
        delta = self.up(inner)
        return h + (delta if self.scaling == 1 else self.scaling * delta).to(h.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {f"adapter_{name}": tensor for name, tensor in self.named_parameters()}

    def from_file(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        super().from_file({name.removeprefix("adapter_"): tensor for name, tensor in tensors.items()})


@register("pfeiffer", target_modules="ffn-output")
@register("houlsby")
@register("bottleneck")
@dataclass
class BottleneckConfig(ModuleConfig):
    """Configuration of `Bottleneck`; `houlsby` and `pfeiffer` are its two published placements.

    Args:
        reduction: Width of the model over width of the bottleneck.
        bottleneck_size: Width of the bottleneck, where it is given directly.
        non_linearity: The function between the two layers.
        dropout: Share of the bottleneck that is dropped in training.
        scaling: Factor s of what is added.

    Raises:
        ConfigError: A reduction or size that is not positive, or a dropout outside [0, 1).
    """

    adapter = Bottleneck
    peft_name = "BOTTLENECK"
    default_targets = (["attention-output", "ffn-output"],)

    reduction: int = 16
    bottleneck_size: int | None = None
    non_linearity: Literal["relu", "gelu", "swish", "tanh"] = "gelu"
    dropout: float = 0.0
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("reduction", self.reduction), ("bottleneck_size", self.bottleneck_size)):
            if value is not None and value <= 0:
                raise ConfigError(f"BottleneckConfig: {name}={value!r}; a positive whole number was expected.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"BottleneckConfig: dropout={self.dropout!r}; a share in [0, 1) was expected.")
