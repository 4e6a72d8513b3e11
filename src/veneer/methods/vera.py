"""VeRA: two frozen random matrices for the whole model, and two trained vectors a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, Shared, WeightAdapter
from veneer.config import WeightConfig, check_positive, check_shares
from veneer.registry import register
from veneer.sites import LinearSite, Site


class Projections(Shared):
    """A (r, in) and B (out, r) for the largest in and out of all places; others use their first columns and rows.

    Both are drawn from the configuration's key, so a file may leave them out.
    """

    prefix = "vera"
    rows = 1  # of A for each of r

    down: Tensor
    up: Tensor

    def __init__(self, sites: Mapping[str, Site], config: Any) -> None:
        super().__init__(sites, config)
        out_features = max(site.shape[0] for site in sites.values())
        in_features = max(site.shape[1] for site in sites.values())
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        self.register_buffer("down", uniform(generator, self.rows * config.r, in_features))  # (r, in)
        self.register_buffer("up", uniform(generator, out_features, config.r))  # (out, r)
        if not config.save_projection:
            self.derived = frozenset(self.to_file())

    def to_file(self) -> dict[str, Tensor]:
        return {f"{self.prefix}_A": self.down, f"{self.prefix}_B": self.up}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        own = {f"{self.prefix}_A": "down", f"{self.prefix}_B": "up"}
        super().from_file({own[name]: tensor for name, tensor in tensors.items()})


def uniform(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Kaiming-uniform for rectifiers: between -sqrt(6 / columns) and sqrt(6 / columns)."""
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)


class Vera(WeightAdapter):
    r"""Scales the rows of two random matrices that all layers share.

        W' = W + diag(b) B diag(d) A

    Trains: d (r,), `d_initial` at the start; b (out,), zero at the start.
    Cost: r + out parameters a layer, and 2 r (in + out) multiply-adds a token. A and B are frozen, so they take
    r (in + out) numbers once for all layers, and no gradient is computed for them. Dropout as in `Lora`.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own d and b.
    Raises: ConfigError for dropout on a bare parameter.
    Source: Kopiczko et al. 2023, arXiv:2310.11454, eq. 2; starting values: its section 3.3.
    """

    shares: ClassVar[type[Projections]] = Projections
    shared: Projections

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)
        self.config = config
        self.prefix = self.shares.prefix
        dropout = f"{self.prefix}_dropout"
        self.dropout = self.input_dropout(getattr(config, dropout), dropout)
        self.d = nn.Parameter(torch.empty(*site.batch, self.shares.rows * config.r))
        self.b = nn.Parameter(torch.empty(*site.batch, site.shape[0]))
        self.starts_as_base = config.init_weights

    def reset(self) -> None:
        if self.config.init_weights:
            nn.init.constant_(self.d, self.config.d_initial)
            nn.init.zeros_(self.b)
        else:
            nn.init.normal_(self.d)
            nn.init.ones_(self.b)

    def projections(self) -> tuple[Tensor, Tensor]:
        """This place's part of A and B, `(r, in)` and `(out, r)`."""
        out_features, in_features = self.site.shape
        return self.shared.down[:, :in_features].to(self.d), self.shared.up[:out_features].to(self.d)

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.projections()
        return weight + (self.b.unsqueeze(-1) * up) @ (self.d.unsqueeze(-1) * down)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "parameter":
            return super().forward(x, base)
        y = base(x)
        down, up = self.projections()
        if x.is_floating_point():
            x = F.dropout(x.to(self.d), self.dropout, self.training)
        if isinstance(self.site, LinearSite):  # the vectors scale what they are multiplied by: A and B get no gradient
            return torch.addcmul(y, self.b.to(y.dtype), F.linear(self.d * F.linear(x, down), up).to(y.dtype))
        factors = self.d.unsqueeze(-1) * down, self.b.unsqueeze(-1) * up
        return y + self.site.apply_factored(x.to(self.d.device), *factors).to(y.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {f"{self.prefix}_lambda_d": self.d, f"{self.prefix}_lambda_b": self.b}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("d", tensors[f"{self.prefix}_lambda_d"])
        self.put("b", tensors[f"{self.prefix}_lambda_b"])


@register("vera")
@dataclass
class VeraConfig(WeightConfig):
    """Configuration of `Vera`, field by field that of `peft`.

    Args:
        r: Rank; far higher than LoRA's, since it costs one parameter each.
        projection_prng_key: Seed of the random matrices.
        save_projection: Write the random matrices into the file. False draws them again on loading.
        vera_dropout: Share of the input that is dropped in training.
        d_initial: What d starts as.
        init_weights: False for a random start that changes the outputs (for tests).

    Raises:
        ConfigError: A rank that is not positive, or a dropout outside [0, 1).
    """

    adapter = Vera
    peft_name = "VERA"
    own_fields = frozenset({"exclude_modules"})
    learning_rates = {"classification": 3e-2, "causal-lm": 4e-3}  # noqa: RUF012  # read only

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
        check_shares(self, "vera_dropout")
