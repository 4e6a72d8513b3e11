"""KaSA: LoRA in the form of a singular value decomposition, in place of the weight's smallest singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.config import Nested
from veneer.errors import ConfigError
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site


@dataclass(frozen=True)
class KasaConfig(Nested):
    """Weights of the terms that KaSA adds to the loss.

    Args:
        beta: Of the squares of the trained singular values.
        gamma: Of the distance of the singular vectors from orthonormal ones.

    Raises:
        ConfigError: One is negative.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0 or self.gamma < 0:
            raise ConfigError(f"KasaConfig: beta={self.beta!r}, gamma={self.gamma!r}; zero or more was expected.")


@variant("kasa", kasa_config=KasaConfig())
class Kasa(Lora):
    r"""Takes the r smallest singular values out of the weight and trains r others with their vectors.

        W = U S V^T,     W' = W - sum_(i > k - r) s_i u_i v_i^T + s up diag(values) down,     k = min(in, out)

    In training the loss gets beta |values|^2 + gamma (|up^T up - 1| + |down down^T - 1|), summed over the places.

    Trains: down (r, in), up (out, r) zero at the start, values (r,).
    Cost: r (in + out + 1) parameters, and 4 r (in + out) multiply-adds a token; one decomposition when the adapter is
    made or loaded. The weight itself stays as it is.
    Start: the base layer without its r smallest singular values. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if r >= min(in, out).
    Source: Wang et al. 2024, arXiv:2412.06071, section 3; the loss is its eqs. 9 to 11.
    """

    starts_as_base = False
    lost_down: Tensor
    lost_up: Tensor

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        if config.r >= min(site.shape):
            raise ConfigError(f"kasa_config: r={config.r}, but the layer is {site.shape}; a smaller rank was expected.")
        self.values = nn.Parameter(torch.empty(*site.batch, config.r))
        # What is taken out of the weight. It follows from the weight, so it stands in no file.
        self.register_buffer("lost_down", torch.empty_like(self.down), persistent=False)
        self.register_buffer("lost_up", torch.empty_like(self.up), persistent=False)

    def reset(self) -> None:
        super().reset()
        nn.init.normal_(self.values)
        self._decompose()

    @torch.no_grad()
    def _decompose(self) -> None:
        weight = self.site.read()
        u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        rank = self.values.shape[-1]
        self.put("lost_down", v[..., -rank:, :].contiguous())
        self.put("lost_up", (u[..., -rank:] * s[..., None, -rank:]).contiguous())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up * self.values.unsqueeze(-2)

    def adapt(self, weight: Tensor) -> Tensor:
        return super().adapt(weight) - self.lost_up @ self.lost_down

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        full = (x.to(self.down.dtype) if x.is_floating_point() else x).to(self.down.device)
        if self.site.kind == "embedding" or (self.dropout and self.training):
            return self.add_product(full, super().add(x, y), self.lost_down, self.lost_up, -1.0)
        # One product of twice the rank. Not on embeddings, where what is joined is larger than what is looked up.
        down, up = self.factors()
        down, up = torch.cat([down, self.lost_down]), torch.cat([self.scaling * up, -self.lost_up], 1)
        return self.add_product(full, y, down, up, 1.0, None if self.bias is None else self.scaling * self.bias)

    @classmethod
    def penalty(cls, adapters: Sequence[Kasa], config: LoraConfig) -> Tensor | None:
        weights: KasaConfig = config.kasa_config
        if weights.beta == weights.gamma == 0:
            return None
        terms = [weights.beta * a.values.square().sum() + weights.gamma * a.skew() for a in adapters]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def skew(self) -> Tensor:
        """|up^T up - 1| + |down down^T - 1|, in Frobenius norm, summed over the matrices of a stack."""
        identity = torch.eye(self.values.shape[-1], device=self.up.device, dtype=self.up.dtype)
        grams = torch.stack([self.up.mT @ self.up, self.down @ self.down.mT])
        return torch.linalg.matrix_norm(grams - identity).sum()

    def to_file(self) -> dict[str, Tensor]:
        return {**super().to_file(), "lora_diag": self.values}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file(tensors)
        self.put("values", tensors["lora_diag"])
        if self.lost_up.is_meta:
            self._decompose()
