"""BitFit: only biases are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig
from veneer.registry import register
from veneer.sites import Site, site_of


class BitFit(WeightAdapter):
    r"""Trains a delta on the layer's bias; layers without a bias get one.

        y = W x + b + delta,     b = 0 where the layer has none

    Trains: delta (out,), zero at the start.
    Cost: out parameters a layer.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype; impossible into layers that have no
    place for a bias (RMSNorm).
    Source: Ben Zaken, Goldberg and Ravfogel 2022, arXiv:2106.10199, section 3; named subsets as in its section 4.1.
    """

    kinds = frozenset({"linear", "conv", "norm"})

    def __init__(self, site: Site, config: BitFitConfig) -> None:
        super().__init__(site, config)
        self.delta = nn.Parameter(torch.empty(site.shape[0]))

    def reset(self) -> None:
        nn.init.zeros_(self.delta)

    def adapt_bias(self, bias: Tensor | None) -> Tensor:
        return self.delta if bias is None else bias + self.delta

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.site.add_bias(base(x), self.delta)

    def to_file(self) -> dict[str, Tensor]:
        return {"bitfit_delta": self.delta}

    def from_file(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        self.put("delta", tensors["bitfit_delta"])


def has_bias(path: str, module: nn.Module) -> bool:
    """Whether this is a layer with a bias of its own."""
    return getattr(module, "bias", None) is not None and site_of(module) is not None


@register("bitfit")
@dataclass
class BitFitConfig(ModuleConfig):
    """Configuration of `BitFit`.

    `target_modules` names the layers, for example `[query, intermediate.dense]` for the paper's subset. None takes
    every layer that has a bias, and on a model without biases every linear layer.
    """

    adapter = BitFit
    peft_name = "BITFIT"
    default_targets = (has_bias, "all-linear")
    learning_rates = {"classification": 2e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only
