"""MonteCLoRA: LoRA whose first factor is random in training, with its spread trained beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.config import Nested
from veneer.errors import ConfigError
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site

FLOOR = 1e-3  # of variances
TINY = 1e-6


@dataclass(frozen=True)
class MontecloraConfig(Nested):
    """What the random factors are like, and how they are held to their prior.

    Args:
        num_samples: Number n of factors that each one is the average of.
        use_entropy: Add the squares of the weights of the average to the loss, which keeps them apart from 0 and 1.
        dirichlet_prior: Concentration of the prior of these weights.
        sample_scaler: Size of the noise; 0 leaves LoRA.
        kl_loss_weight: Weight of the divergence from the prior in the loss.
        buffer_size: Kept for `peft`'s files; numbers are drawn when they are needed.

    Raises:
        ConfigError: A number that has to be positive is not.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"MontecloraConfig: {name}={getattr(self, name)!r}; a positive number was expected.")


@variant("monteclora", monteclora_config=MontecloraConfig())
class Monteclora(Lora):
    r"""In training, takes the weighted mean of n random factors for down.

        down' = down + c sum_i w_i Z_i,     Z_i ~ N(0, diag(v)),     v = exp(2 log_std) diag(S),     S ~ Wishart(1, r)
        w = softmax(m + t z),   z ~ N(0, 1),   m = log a - mean(log a),   t^2 = (1 - 2 / n) / a + sum(1 / a) / n^2

    with a = exp(log_weights), and c `sample_scaler`. Only this much is drawn: the diagonal of S has independent
    chi-square entries of r degrees of freedom, and sum_i w_i Z_i is one normal factor of size |w|.

    In training the loss gets the mean over all places of the divergence from the prior, times `kl_loss_weight`:
    KL(Dirichlet(a), Dirichlet(prior)) + KL(Wishart(exp(2 log_std)), Wishart(1)) + n E KL(N(0, diag(v)), N(0, 1)).

    Trains: down (r, in), up (out, r) zero at the start, log_std (r,) and log_weights (n,), uniform in [0, 1) at the
    start.
    Cost: r (in + out + 1) + n parameters, and in training r in normal numbers a call.
    Start: equals the base layer exactly. Outside of training, and in a merge, it is LoRA.
    Source: Sengupta et al. 2024, arXiv:2411.04358, section 3.
    """

    kinds = frozenset({"linear", "conv"})

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.settings: MontecloraConfig = config.monteclora_config
        self.log_std = nn.Parameter(torch.empty(config.r))
        self.log_weights = nn.Parameter(torch.empty(self.settings.num_samples))

    def reset(self) -> None:
        super().reset()
        nn.init.uniform_(self.log_std)
        nn.init.uniform_(self.log_weights)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            return super().add(x, y)
        x = F.dropout(x.to(self.down.dtype), self.dropout, self.training).to(self.down.device)
        rank = self.down.shape[0]
        chi_square = self.down.new_empty(rank, rank).normal_().square().sum(1)
        down = self.down + self.noise(chi_square, self.weights(), torch.randn_like(self.down))
        return self.add_product(x, y, down, self.up, self.scaling, self.bias)

    def noise(self, chi_square: Tensor, weights: Tensor, normal: Tensor) -> Tensor:
        """What is added to down, from the diagonal of S, w, and a normal factor."""
        variance = (chi_square * (2 * self.log_std).exp()).clamp_min(FLOOR)
        return self.settings.sample_scaler * weights.norm() * variance.sqrt()[:, None] * normal

    def weights(self, normal: Tensor | None = None) -> Tensor:
        """w, `(n,)`, from normal numbers, drawn unless they are given."""
        normal = torch.randn_like(self.log_weights) if normal is None else normal
        n = self.settings.num_samples
        logs = self.log_weights.clamp_min(math.log(TINY))
        inverse = (-logs).exp()
        variance = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp_min(TINY) + TINY
        return (logs - logs.mean() + variance.sqrt() * normal).softmax(0)

    def divergence(self) -> Tensor:
        """The divergence of what is drawn from its prior."""
        n, rank = self.settings.num_samples, self.log_std.shape[0]
        a, prior = self.log_weights.exp(), torch.full_like(self.log_weights, self.settings.dirichlet_prior)
        dirichlet = a.sum().lgamma() - a.lgamma().sum() - prior.sum().lgamma() + prior.lgamma().sum()
        dirichlet = dirichlet + ((a - prior) * (a.digamma() - a.sum().digamma())).sum()
        variance, log_variance = (2 * self.log_std).exp(), 2 * self.log_std
        wishart = rank / 2 * (variance.sum() - log_variance.sum() - rank)
        # The mean of a chi-square of r degrees is r, that of its logarithm digamma(r / 2) + log 2.
        half = torch.full_like(self.log_std, rank / 2)
        normal = n / 2 * (rank * variance - log_variance - half.digamma() - math.log(2) - 1).sum()
        return dirichlet + wishart + normal

    @classmethod
    def penalty(cls, adapters: Sequence[Monteclora], config: LoraConfig) -> Tensor | None:
        settings: MontecloraConfig = config.monteclora_config
        terms = [settings.kl_loss_weight * adapter.divergence() for adapter in adapters]
        if settings.use_entropy:
            terms += [adapter.weights().square().sum() for adapter in adapters]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() / len(adapters) if terms else None

    def to_file(self) -> dict[str, Tensor]:
        # The last two are what peft keeps of its last draw.
        rank, n = self.log_std.shape[0], self.log_weights.shape[0]
        own = {
            "std_prior": self.log_std,
            "expert_weights_prior": self.log_weights,
            "gaussian_var_prior": torch.eye(rank, dtype=self.log_std.dtype, device=self.log_std.device),
            "expert_weights": torch.full_like(self.log_weights, 1 / n),
        }
        return super().to_file() | {f"lora_monteclora_sampler.{name}": tensor for name, tensor in own.items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file(tensors)
        self.put("log_std", tensors["lora_monteclora_sampler.std_prior"])
        self.put("log_weights", tensors["lora_monteclora_sampler.expert_weights_prior"])
