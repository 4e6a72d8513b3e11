"""DeLoRA: LoRA of rank-one parts of equal length, under a bound that is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.adapter import WeightAdapter
from veneer.config import WeightConfig, check_positive, check_shares, own
from veneer.products import LowRank
from veneer.registry import register
from veneer.sites import Site

SHORTEST = 1e-4


class Delora(WeightAdapter):
    r"""Adds rank-one matrices that are all equally long, so that angles and strength are trained apart.

        W' = W + up diag(bound / (r |down_i| |up^i|)) down diag(lengths)

    down_i is row i of down, up^i column i of up, neither taken as shorter than 0.0001; lengths are those of the
    columns of W at the start.

    Trains: down (r, in); up (out, r), zero at the start; bound (1,). Frozen: lengths (in,).
    Cost: r (in + out) + 1 parameters, and 2 r (in + out) multiply-adds a token.
    Dropout acts on the input of down, in training only.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own down, up and lengths, and all have one bound.
    Raises: ConfigError for dropout on bare parameters.
    Source: Bini et al. 2025, arXiv:2503.18225, eq. 8 and 9.
    """

    lengths: Tensor

    def __init__(self, site: Site, config: DeloraConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.starts_as_base = config.init_weights
        self.dropout = self.input_dropout(config.module_dropout, "module_dropout")
        self.down = nn.Parameter(torch.empty(*site.batch, config.r, site.shape[1]))
        self.up = nn.Parameter(torch.empty(*site.batch, site.shape[0], config.r))
        self.bound = nn.Parameter(torch.empty(1))
        self.register_buffer("lengths", torch.empty(*site.batch, site.shape[1]))

    def reset(self) -> None:
        bounds = [
            (self.down, self.down.shape[-1] ** -0.5),
            (self.up, 0.0 if self.config.init_weights else self.r**-0.5),
        ]
        for factor, bound in bounds:  # as torch starts linear layers
            nn.init.uniform_(factor, -bound, bound)
        nn.init.constant_(self.bound, self.config.delora_lambda)
        self.lengths.copy_(torch.linalg.vector_norm(self.site.read(), dim=-2))

    @property
    def r(self) -> int:
        return self.down.shape[-2]

    def scaled_down(self) -> Tensor:
        """diag(bound / (r |down_i| |up^i|)) down diag(lengths)."""
        lengths = torch.linalg.vector_norm(self.down, dim=-1).clamp_min(SHORTEST)
        lengths = lengths * torch.linalg.vector_norm(self.up, dim=-2).clamp_min(SHORTEST)
        return (self.bound / self.r / lengths).unsqueeze(-1) * self.down * self.lengths.unsqueeze(-2)

    def product(self) -> LowRank:
        return LowRank(self.scaled_down(), self.up)

    # Layout of peft.

    NAMES = {  # noqa: RUF012  # read only
        "delora_A": "down",
        "delora_B": "up",
        "delora_lambda": "bound",
        "delora_w_norm": "lengths",
    }

    def to_file(self) -> dict[str, Tensor]:
        return {key: getattr(self, name) for key, name in self.NAMES.items()}

    def from_file(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        for key, tensor in tensors.items():
            self.put(self.NAMES[key], tensor)


@register("delora")
@dataclass
class DeloraConfig(WeightConfig):
    """Configuration of `Delora`, field by field that of `peft`.

    Args:
        r: Rank.
        delora_lambda: The bound at the start: how long the change of the weight can be, in lengths of its columns.
        module_dropout: Share of the input that is dropped in training.
        init_weights: True starts with up = 0, False with random factors (for tests).
        rank_pattern: Rank by module name or regular expression, where it differs from `r`.
        lambda_pattern: The same for `delora_lambda`.

    Raises:
        ConfigError: A rank that is not positive, or a dropout outside [0, 1).
    """

    adapter = Delora
    peft_name = "DELORA"
    learning_rates = {"classification": 1e-4, "causal-lm": 1e-4}  # noqa: RUF012  # its steps are as long as the weight
    patterns = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}  # noqa: RUF012  # read only

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)
    fan_in_fan_out: bool = own(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "rank_pattern")
        check_shares(self, "module_dropout")
