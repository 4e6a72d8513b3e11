"""BEFT: only the biases of the value projections are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from veneer.config import ModuleConfig
from veneer.methods.bitfit import BitFit
from veneer.registry import register
from veneer.sites import Site


class Beft(BitFit):
    r"""Trains a delta on the layer's bias, by default on value projections; layers without a bias get one.

        y = W x + b + delta,     b = 0 where the layer has none

    Trains: delta (out,), zero at the start.
    Cost: out parameters a layer.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Source: Huang, Balashankar and Aminifar 2025, arXiv:2509.15974.
    """

    kinds = frozenset({"linear", "conv"})

    def __init__(self, site: Site, config: BeftConfig) -> None:
        super().__init__(site, config)  # type: ignore[arg-type]  # of which BitFit reads nothing
        self.config = config

    def reset(self) -> None:
        nn.init.normal_(self.delta, std=0 if self.config.init_weights else 1)

    def to_file(self) -> dict[str, Tensor]:
        return {"beft_bias": self.delta.unsqueeze(0)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("delta", tensors["beft_bias"].squeeze(0))


@register("beft")
@dataclass
class BeftConfig(ModuleConfig):
    """Configuration of `Beft`, field by field that of `peft`.

    `target_modules=None` takes the value projections; where values come from one projection with queries and keys, all
    of it.

    Args:
        init_weights: Start as the base layer; False starts with random numbers (for tests).
    """

    adapter = Beft
    peft_name = "BEFT"
    own_fields = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    default_targets = (["attention-values"],)
    learning_rates = {"classification": 1e-2, "causal-lm": 5e-3}  # noqa: RUF012  # read only

    init_weights: bool = True
