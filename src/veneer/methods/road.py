"""RoAd: pairs of output channels are turned and scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig
from veneer.errors import ConfigError
from veneer.products import allowed_by_hand
from veneer.registry import register
from veneer.sites import ConvSite, EmbeddingSite, Site


class Road(WeightAdapter):
    r"""Turns every pair of output channels by an angle, and scales it.

        y'_i = a_i cos(t_i) y_i - b_i sin(u_i) y_j,     y'_j = b_j sin(u_j) y_i + a_j cos(t_j) y_j
        W' = R W,     b' = R b

    In a group of g channels, i of the first half is paired with j = i + g / 2. `road_1` has one angle and one scale
    for each pair (a = b and t = u, the same for i and j), `road_2` one of each for a channel (a = b and t = u), and
    `road_4` all of them.

    Trains: angle and scale, each (out / 2,), (out,) or (2 out,); angles zero, scales one at the start.
    Cost: out, 2 out or 4 out parameters, and two multiply-adds for each number of the output.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError where `group_size` does not divide the number of channels, or of those in a convolution's group.
    Source: Liao and Monz 2024, arXiv:2409.00119, eq. 4.
    """

    def __init__(self, site: Site, config: RoadConfig) -> None:
        super().__init__(site, config)
        self.config = config
        channels = site.shape[0]
        groups = site.module.groups if isinstance(site, ConvSite) else 1
        if channels // groups % config.group_size:
            raise ConfigError(
                f"group_size={config.group_size} does not divide the {channels // groups} output channels of this "
                f"layer{' in each of its groups' if groups > 1 else ''}. Choose an even number that does."
            )
        size = {"road_1": channels // 2, "road_2": channels, "road_4": 2 * channels}[config.variant]
        self.angle = nn.Parameter(torch.empty(*site.batch, size))
        self.scale = nn.Parameter(torch.empty(*site.batch, size))

    def reset(self) -> None:
        spread = 0 if self.config.init_weights else 0.5
        nn.init.normal_(self.angle, std=spread)
        nn.init.normal_(self.scale, mean=1, std=spread)

    def columns(self) -> tuple[Tensor, Tensor]:
        """What every channel is multiplied by, and its partner; each (out / g, 2, g / 2), the first perhaps 1 for 2."""
        half = self.config.group_size // 2
        kinds = 2 if self.config.variant == "road_4" else 1
        halves = 1 if self.config.variant == "road_1" else 2
        angle, scale = (t.unflatten(-1, (-1, kinds, halves, half)) for t in (self.angle, self.scale))
        own = scale.select(-3, 0) * angle.select(-3, 0).cos()
        partner = scale.select(-3, -1) * angle.select(-3, -1).sin()
        minus, plus = -partner.narrow(-2, 0, 1), partner.narrow(-2, halves - 1, 1)
        return own, torch.cat((minus, plus), -2)

    def turned(self, y: Tensor, after: int) -> Tensor:
        """R y, where `after` axes follow that of the channels."""
        own, partner = (t.reshape(*t.shape, *[1] * after) for t in self.columns())
        axis = -2 - after
        pairs = y.to(own.dtype).unflatten(-1 - after, (-1, 2, self.config.group_size // 2))
        if not self.site.batch and allowed_by_hand(y):
            return _Turn.apply(pairs, own.expand_as(partner), partner, axis).flatten(axis - 1, axis + 1)
        return torch.addcmul(own * pairs, partner, pairs.flip(axis)).flatten(axis - 1, axis + 1)

    def adapt(self, weight: Tensor) -> Tensor:
        return self.turned(weight, 1)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self.turned(bias, 0)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "parameter":
            return super().forward(x, base)
        y = base(x)
        after = self.site.module.get_parameter("weight").dim() - 2 if self.site.kind == "conv" else 0
        turned = self.turned(y, after).to(y.dtype)
        return self.site.without_padding(x, turned) if isinstance(self.site, EmbeddingSite) else turned

    def to_file(self) -> dict[str, Tensor]:
        return {"road_theta": self.angle, "road_alpha": self.scale}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("angle", tensors["road_theta"])
        self.put("scale", tensors["road_alpha"])


class _Turn(torch.autograd.Function):
    """own * y + partner * (y with the halves of `axis` swapped), without a swapped copy of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, own: Tensor, partner: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(y, own, partner)
        ctx.axis = axis
        turned = y * own
        for half in (0, 1):
            turned.select(axis, half).addcmul_(y.select(axis, 1 - half), partner.select(axis, half))
        return turned

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, own, partner = ctx.saved_tensors
        axis, needs_y = ctx.axis, ctx.needs_input_grad[0]
        if torch.is_grad_enabled():  # of the gradient too
            products = [(g * y).sum_to_size(own.shape), (g * y.flip(axis)).sum_to_size(own.shape)]
            return g * own + (g * partner).flip(axis), *products, None
        # One piece of memory for all that is summed, and for the gradient of y.
        memory = g * y
        grad_own = _summed(memory, own)
        for half in (0, 1):
            torch.mul(g.select(axis, half), y.select(axis, 1 - half), out=memory.select(axis, half))
        grad_partner = _summed(memory, own)
        if needs_y:
            torch.mul(g, own, out=memory)
            for half in (0, 1):
                memory.select(axis, 1 - half).addcmul_(g.select(axis, half), partner.select(axis, half))
        return memory if needs_y else None, grad_own, grad_partner, None


def _summed(products: Tensor, like: Tensor) -> Tensor:
    """The sum over what `like` is broadcast along, never in the memory of `products`."""
    return products.clone() if products.shape == like.shape else products.sum_to_size(like.shape)


@register("road")
@dataclass
class RoadConfig(ModuleConfig):
    """Configuration of `Road`, field by field that of `peft`.

    Args:
        variant: How many angles and scales a pair of channels has: `road_1`, `road_2` or `road_4`.
        group_size: Channels of a group, whose first half is paired with its second; even, and a divisor of their
            number. It changes which channels are paired, and nothing else.
        init_weights: Start as the base layer; False starts with random angles and scales (for tests).

    Raises:
        ConfigError: `group_size` is not positive or not even.
    """

    adapter = Road
    peft_name = "ROAD"
    learning_rates = {"classification": 1e-2, "causal-lm": 5e-3}  # noqa: RUF012  # read only
    own_fields = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size <= 0 or self.group_size % 2:
            raise ConfigError(f"RoadConfig: group_size={self.group_size}; a positive even number was expected.")
