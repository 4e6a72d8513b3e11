"""PVeRA: VeRA whose hidden vector is drawn from a trained normal distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base
from veneer.config import WeightConfig, check_positive, check_shares
from veneer.errors import UnsupportedError
from veneer.methods.vera import Projections, Vera
from veneer.registry import register
from veneer.sites import Site


class PveraProjections(Projections):
    """A (2 r, in), whose first half gives means and whose second half gives variances, and B (out, r)."""

    prefix = "pvera"
    rows = 2


class Pvera(Vera):
    r"""Draws the hidden vector of VeRA anew for every token, in training.

        y = W x + b + diag(b') B z,     z ~ N(mu, exp(log_variance)),     (mu, log_variance) = diag(d) A x

    Outside of training z = mu, so that W' = W + diag(b') B diag(d_mu) A_mu; with `sample_at_inference` z is drawn there
    as well.

    Trains: d (2 r,), `d_initial` at the start; b' (out,), zero at the start.
    Cost: 2 r + out parameters a layer; A and B are frozen and shared by all layers.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype, to the mean; UnsupportedError with
    `sample_at_inference`. Linear layers only: the noise is that of a token's hidden vector.
    Source: 2025, arXiv:2512.07703, section 3.
    """

    kinds = frozenset({"linear"})
    shares = PveraProjections

    def __init__(self, site: Site, config: PveraConfig) -> None:
        super().__init__(site, config)
        self.generator = None  # of its own, on the CPU, where a seed asks for one
        if config.generator_seed is not None:
            self.generator = torch.Generator("cpu").manual_seed(config.generator_seed)

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.projections()
        r = self.config.r
        return weight + (self.b.unsqueeze(-1) * up) @ (self.d[:r].unsqueeze(-1) * down[:r])

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        down, up = self.projections()
        x = F.dropout(x.to(self.d), self.dropout, self.training)
        if self.training or self.config.sample_at_inference:
            mean, log_variance = (self.d * F.linear(x, down)).chunk(2, dim=-1)
            hidden = mean + self.noise(mean) * torch.exp(0.5 * log_variance)
        else:
            r = self.config.r
            hidden = self.d[:r] * F.linear(x, down[:r])
        return torch.addcmul(y, self.b.to(y.dtype), F.linear(hidden, up).to(y.dtype))

    def noise(self, like: Tensor) -> Tensor:
        if self.generator is None:
            return torch.randn_like(like)
        return torch.randn(like.shape, dtype=like.dtype, device="cpu", generator=self.generator).to(like.device)

    def merge_into(self, layer: nn.Module) -> nn.Module:
        if self.config.sample_at_inference:
            raise UnsupportedError(
                "sample_at_inference=True: outputs are drawn at random, so no weight gives them, and the adapter "
                "cannot be merged. Set it to False to merge the mean."
            )
        return super().merge_into(layer)


@register("pvera")
@dataclass
class PveraConfig(WeightConfig):
    """Configuration of `Pvera`, field by field that of `peft`.

    Args:
        r: Size of the hidden vector.
        projection_prng_key: Seed of the random matrices.
        save_projection: Write the random matrices into the file. False draws them again on loading.
        pvera_dropout: Share of the input that is dropped in training.
        d_initial: What d starts as.
        init_weights: False for a random start that changes the outputs (for tests).
        sample_at_inference: Draw the hidden vector outside of training too.
        generator_seed: Seed of the draws, for each layer by itself; none takes torch's own generator.

    Raises:
        ConfigError: A rank that is not positive, or a dropout outside [0, 1).
    """

    adapter = Pvera
    peft_name = "PVERA"
    own_fields = frozenset({"exclude_modules"})
    learning_rates = {"classification": 4e-3, "causal-lm": 4e-3}  # noqa: RUF012  # read only

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
        check_shares(self, "pvera_dropout")
