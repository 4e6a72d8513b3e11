"""SSF: every channel of every layer's output is scaled and shifted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from veneer import targets
from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig
from veneer.registry import register
from veneer.sites import Site, site_of


class SSF(WeightAdapter):
    r"""Scales and shifts the output of a layer, channel by channel.

        y' = scale * y + offset          W' = diag(scale) W,   b' = scale * b + offset

    A layer that cannot hold a bias, such as an RMSNorm, is scaled alone: no merge could keep its offset.

    Trains: scale (out,), one, and offset (out,), zero at the start, each moved by a little noise.
    Cost: 2 out parameters a layer.
    Start: changes the outputs slightly. Merge: exact up to rounding of the dtype.
    Source: Lian et al. 2022, arXiv:2210.08823, eq. 3 and 5; the noise is that of its code.
    """

    kinds = frozenset({"linear", "conv", "norm"})
    starts_as_base = False

    def __init__(self, site: Site, config: SSFConfig) -> None:
        super().__init__(site, config)
        channels = site.shape[0]
        self.std = config.init_std
        self.starts_as_base = config.init_std == 0
        self.scale = nn.Parameter(torch.empty(channels))
        self.offset = nn.Parameter(torch.empty(channels)) if site.can_hold_bias() else None

    def reset(self) -> None:
        nn.init.normal_(self.scale, 1.0, self.std)
        if self.offset is not None:
            nn.init.normal_(self.offset, 0.0, self.std)

    def adapt(self, weight: Tensor) -> Tensor:
        return self.scale.unsqueeze(-1) * weight

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        if self.offset is None:
            return bias
        return self.offset if bias is None else self.scale * bias + self.offset

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        wide = y.to(self.scale.dtype)
        scaled = wide * self.site.per_channel(self.scale, wide)
        return (scaled if self.offset is None else scaled + self.site.per_channel(self.offset, wide)).to(y.dtype)


@register("ssf")
@dataclass
class SSFConfig(ModuleConfig):
    """Configuration of `SSF`. `target_modules=None` takes every linear layer but the output head, convolution and norm.

    Args:
        init_std: Deviation of the starting values from one and zero.
    """

    adapter = SSF
    peft_name = "SSF"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only

    init_std: float = 0.02

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.target_modules is not None:
            return self
        linear = set(targets.match(root, replace(self, target_modules=targets.ALL_LINEAR), modules=modules))
        sites = {path: site_of(module) for path, module in modules.items()}
        others = {path for path, site in sites.items() if site is not None and site.kind in ("conv", "norm")}
        chosen = [path for path in modules if path in linear | others]
        return replace(self, target_modules=targets.exactly(chosen, modules))
