"""RandLoRA: a full-rank change, as a sum of random low-rank matrices that are scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, Shared, WeightAdapter, onto
from veneer.config import WeightConfig, check_positive, check_shares
from veneer.registry import register
from veneer.sites import Site


class Bases(Shared):
    """A (r, 1, short) and B (long, n, r) for the longest sides of all places; others use parts of them.

    short and long are the sides, n = short / r rounded up. All is drawn from the configuration's key, so a file may
    leave it out.
    """

    a: Tensor
    b: Tensor

    def __init__(self, sites: Mapping[str, Site], config: RandLoraConfig) -> None:
        super().__init__(sites, config)
        short, long = sorted(max(site.shape[axis] for site in sites.values()) for axis in (0, 1))
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        shapes = [(config.r, 1, short), (long, -(-short // config.r), config.r)]
        if config.sparse or config.very_sparse:
            sparsity = math.sqrt(short) if config.very_sparse else 3
            a, b = (ternary(generator, shape, sparsity) for shape in shapes)
        else:
            a = uniform(generator, shapes[0])
            b = torch.cat([uniform(generator, (long, 1, config.r)) for _ in range(shapes[1][1])], dim=1)
        self.register_buffer("a", (a / a.std()).float())
        self.register_buffer("b", (b / b.std()).float())
        if not config.save_projection:
            self.derived = frozenset(self.to_file())

    def to_file(self) -> dict[str, Tensor]:
        return {"randlora_A": self.a, "randlora_B": self.b}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file({{"randlora_A": "a", "randlora_B": "b"}[name]: tensor for name, tensor in tensors.items()})


def uniform(generator: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
    """Between -1 and 1 over the root of the last two sizes, in 16 bits, as `peft` draws it."""
    bound = 1 / math.sqrt(shape[1] * shape[2])
    return torch.empty(shape, device="cpu", dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def ternary(generator: torch.Generator, shape: tuple[int, int, int], sparsity: float) -> Tensor:
    """-1 and 1 with probability 1 / (2 sparsity) each, 0 otherwise."""
    drawn = torch.rand(shape, device="cpu", generator=generator)
    share = 1 / (2 * sparsity)
    return (drawn > 1 - share).float() - (drawn < share).float()


class RandLora(WeightAdapter):
    r"""Adds n random matrices of rank r, each with its rows and columns scaled.

        W' = W + s sum over j of B_j diag(lambda_j) A diag(gamma_j),     s = alpha / r

    All layers share A (r, short) and B_j (long, r). short and long are the sides of W, and the sum is transposed
    where `in` is the longer one. n = short / r rounded up, so that the sum may have full rank.

    Trains: lambda (r, n), zero at the start; gamma (n, short).
    Cost: n (r + short) parameters. The sum has n r >= short terms, so with many tokens it is cheapest to form it, in
    short in out multiply-adds a call; with few it is run like LoRA, and so it is with dropout, which acts on its input.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of matrices every matrix has its own lambda and gamma.
    Raises: ConfigError for dropout on a bare parameter.
    Source: Albert et al. 2025, arXiv:2502.00987, eq. 3; sparse bases: its section 6.4.
    """

    shares = Bases
    shared: Bases
    optional = frozenset({"randlora_A", "randlora_B"})  # peft writes what is shared for every layer too

    def __init__(self, site: Site, config: RandLoraConfig) -> None:
        super().__init__(site, config)
        self.short, self.long = sorted(site.shape)
        self.bases = -(-self.short // config.r)
        self.r = config.r
        self.scaling = config.randlora_alpha / config.r
        self.dropout = self.input_dropout(config.randlora_dropout, "randlora_dropout")
        self.starts_as_base = config.init_weights
        self.rows = nn.Parameter(torch.empty(*site.batch, config.r, self.bases))
        self.columns = nn.Parameter(torch.empty(*site.batch, self.bases, self.short))

    def reset(self) -> None:
        if self.starts_as_base:
            nn.init.zeros_(self.rows)
            nn.init.constant_(self.columns, 1 / max(self.columns.shape[-2:]))
        else:
            nn.init.normal_(self.rows)
            nn.init.constant_(self.columns, 1 / self.long)

    def factors(self) -> tuple[Tensor, Tensor]:
        """down (n r, in), scaled, and up (out, n r)."""
        a = self.shared.a[:, :, : self.short].to(self.rows)  # (r, 1, short)
        b = self.shared.b[: self.long, : self.bases].to(self.rows).flatten(1)  # (long, n r)
        scaled = self.scaling * self.rows.unsqueeze(-1) * self.columns.unsqueeze(-3) * a  # (r, n, short)
        scaled = scaled.flatten(-3, -2)
        return (scaled, b) if self.site.shape[1] == self.short else (b.t(), scaled.mT)

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.factors()
        return onto(up @ down, weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        tokens = x.numel() // (self.site.shape[1] if self.site.kind == "linear" else 1)
        dropped = self.training and self.dropout > 0
        if self.site.kind == "parameter" or not (dropped or 2 * tokens < self.short):
            return super().forward(x, base)
        y = base(x)
        if dropped:
            x = F.dropout(x.to(self.rows.dtype), self.dropout)
        return self.site.add_factored(x, y, *self.factors())

    def to_file(self) -> dict[str, Tensor]:
        return {"randlora_lambda": self.rows, "randlora_gamma": self.columns}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("rows", tensors["randlora_lambda"])
        self.put("columns", tensors["randlora_gamma"])


@register("randlora")
@dataclass
class RandLoraConfig(WeightConfig):
    """Configuration of `RandLora`, field by field that of `peft`.

    Args:
        r: Rank of one base; a smaller one means more of them, and more parameters.
        randlora_alpha: Numerator of the scaling.
        projection_prng_key: Seed of the bases.
        save_projection: Write the bases into the file. False draws them again on loading.
        sparse: Bases of -1, 0 and 1, two thirds of them zero.
        very_sparse: The same, all but one in sqrt(short) zero; wins over `sparse`.
        randlora_dropout: Share of the input that is dropped in training.
        init_weights: False for a random start that changes the outputs (for tests).

    Raises:
        ConfigError: A rank that is not positive, or a dropout outside [0, 1).
    """

    adapter = RandLora
    peft_name = "RANDLORA"
    own_fields = frozenset({"exclude_modules"})

    r: int = 32
    randlora_alpha: float = 640
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
        check_shares(self, "randlora_dropout")
