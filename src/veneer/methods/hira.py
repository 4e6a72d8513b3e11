"""HiRA: the weight times a low-rank matrix, element by element."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig, check_positive, check_shares
from veneer.registry import register
from veneer.sites import EmbeddingSite, Site


class Hira(WeightAdapter):
    r"""Changes every element of the weight in proportion to itself, by a product of two thin matrices.

        W' = W + W * (up down),     * element by element

    Trains: down (r, in); up (out, r), zero at the start.
    Cost: r (in + out) parameters; r in out multiply-adds a call to form the product, and no further one a token than
    the layer itself has. On an embedding the product is formed for the rows that are looked up.
    Dropout acts on the input of the change, in training only; it costs a second pass through the layer.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own down and up.
    Raises: ConfigError for dropout on bare parameters.
    Source: Huang et al. 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation (ICLR 2025), eq. 4.
    """

    def __init__(self, site: Site, config: HiraConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.starts_as_base = bool(config.init_weights)
        self.dropout = self.input_dropout(config.hira_dropout, "hira_dropout")
        self.down = nn.Parameter(torch.empty(*site.batch, config.r, site.shape[1]))
        self.up = nn.Parameter(torch.empty(*site.batch, site.shape[0], config.r))

    def reset(self) -> None:
        start = self.config.init_weights
        nn.init.normal_(self.down)
        nn.init.normal_(self.up)
        if not start:
            return
        if self.site.kind == "embedding":
            nn.init.zeros_(self.down)
            return
        nn.init.zeros_(self.up)
        if start == "gaussian":
            nn.init.normal_(self.down, std=1 / self.config.r)
        else:
            bound = 1 / math.sqrt(self.down.shape[-1])
            nn.init.uniform_(self.down, -bound, bound)

    def adapt(self, weight: Tensor) -> Tensor:
        return torch.addcmul(weight, weight, self.up @ self.down)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        site = self.site
        if isinstance(site, EmbeddingSite) and site.module.max_norm is None:
            factor = F.linear(F.embedding(x.to(self.down.device), self.down.t()), self.up)
            y = base(x)
            return torch.addcmul(y, y, site.without_padding(x, factor).to(y.dtype))
        if not self.dropout or not self.training:
            return super().forward(x, base)
        change = base.weight() * (self.up @ self.down)
        return base(x) + site.apply(F.dropout(x, self.dropout), change, None, base.args, base.kwargs)

    # Layout of peft: A is down, B is up; convolutions keep their kernel's shape in A.

    def to_file(self) -> dict[str, Tensor]:
        down: Tensor = self.down
        up: Tensor = self.up
        if self.site.kind == "embedding":
            return {"hira_embedding_A": down, "hira_embedding_B": up}
        if self.site.kind == "conv":
            kernel = self.site.module.get_parameter("weight").shape[1:]
            down, up = down.reshape(-1, *kernel), up.reshape(*up.shape, *[1] * (len(kernel) - 1))
        return {"hira_A": down, "hira_B": up}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            name = "down" if key.endswith("A") else "up"
            self.put(name, tensor.reshape(self.get_parameter(name).shape))


@register("hira")
@dataclass
class HiraConfig(ModuleConfig):
    """Configuration of `Hira`, field by field that of `peft`.

    Args:
        r: Rank of the factor; that of the change is up to r times the weight's.
        hira_dropout: Share of the change's input that is dropped in training.
        init_weights: Starting values: True (uniform down, zero up), `"gaussian"` (down with deviation 1 / r), or False
            for random factors (for tests).
        rank_pattern: Rank by module name or regular expression, where it differs from `r`.
        fan_in_fan_out: Kept for `peft`'s files; how a layer stores its weight is seen from the layer.

    Raises:
        ConfigError: A rank that is not positive, or a dropout outside [0, 1).
    """

    adapter = Hira
    peft_name = "HIRA"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only
    patterns = {"rank_pattern": "r"}  # noqa: RUF012  # read only

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["gaussian"] | None = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "rank_pattern")
        check_shares(self, "hira_dropout")
