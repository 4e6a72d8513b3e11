"""AdapterFusion: trained adapters, weighted for every token by attention over what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from veneer.adapter import Base
from veneer.errors import ConfigError
from veneer.experts import Combined, ExpertsConfig
from veneer.registry import register
from veneer.sites import Site


class Fusion(Combined):
    r"""Attends, with the layer's output as query, to what the trained adapters would add to it.

        y' = y + sum_i a_i V z_i,     a = softmax_i((Q y) . (K z_i)),     z_i = adapter_i(x) - y

    y is the layer's output and z_i what adapter i adds to it, its residual left out; there are no biases. The loss has
    the term w ||V - I||^2, the sum over all places. Adapters may be of any method that attaches to linear layers and
    shares nothing between them, each trained by itself before; they stay as they are. Heads that were trained with them
    are left out: the fusion is trained with a head of its own.

    Trains: query, key (d, d), N(0, .02); value (d, d), the identity.
    Cost: 3 d^2 parameters a place; the file holds the adapters too.
    Start: about the mean of the adapters. Merge: impossible, since the weights depend on the token.
    Source: Pfeiffer et al. 2021, arXiv:2005.00247, eq. 3 to 5; the term: the authors' code.
    """

    starts_as_base = False
    config: FusionConfig

    def __init__(self, module: nn.Module, site: Site, config: FusionConfig) -> None:
        super().__init__(module, site, config)
        width = site.shape[0]
        self.query = nn.Parameter(torch.empty(width, width))
        self.key = nn.Parameter(torch.empty(width, width))
        self.value = nn.Parameter(torch.empty(width, width))

    def reset(self) -> None:
        super().reset()
        nn.init.normal_(self.query, std=0.02)
        nn.init.normal_(self.key, std=0.02)
        nn.init.eye_(self.value)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        z = torch.stack(self.outputs(x, y, base), -2).to(self.key.dtype)  # (..., experts, out)
        asked = y.to(self.query.dtype) @ self.query.mT @ self.key  # (..., out): K^T Q y
        shares = (z @ asked.unsqueeze(-1)).softmax(-2)  # (..., experts, 1)
        return y + ((shares * z).sum(-2) @ self.value.mT).to(y.dtype)

    @classmethod
    def penalty(cls, adapters: Sequence[Self], config: FusionConfig) -> Tensor | None:
        if not config.regularization:
            return None
        terms = []
        for adapter in adapters:
            eye = torch.eye(adapter.value.shape[0], dtype=adapter.value.dtype, device=adapter.value.device)
            terms.append((adapter.value - eye).square().sum().to(adapters[0].value.device))
        return config.regularization * torch.stack(terms).sum()


@register("fusion")
@dataclass
class FusionConfig(ExpertsConfig):
    """Configuration of `Fusion`.

    Args:
        adapters: Folders of the trained adapters, a list or by the names that they are to have; read when the fusion
            is new.
        experts: Their configurations, written into the file; or method strings of new ones.
        regularization: Weight of the term that keeps the value matrices near the identity.

    Raises:
        ConfigError: A negative weight, or adapters that cannot be combined.
    """

    adapter = Fusion
    peft_name = "FUSION"
    learning_rates = {"classification": 5e-4, "causal-lm": 2e-4}  # noqa: RUF012  # read only

    regularization: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regularization < 0:
            raise ConfigError(f"FusionConfig: regularization={self.regularization}; it cannot be negative.")
