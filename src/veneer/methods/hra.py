"""HRA: Householder reflection adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import WeightConfig, check_positive
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import EmbeddingSite, Site


class Hra(WeightAdapter):
    r"""Reflects the input of the layer at r trained hyperplanes, one after the other.

        W' = W H_1 ... H_r,     H_i = I - 2 u_i u_i^T / |u_i|^2

    With `apply_GS` the u_i are made orthonormal first, so that W' = W (I - 2 Q Q^T). On an embedding the looked-up
    vectors are reflected. The product is never formed: it is I - U T U^T for unit vectors U = (u_1, ..., u_r), with
    T^-1 = I / 2 + (the part of U^T U above its diagonal).

    Trains: normals (in, r), in equal pairs at the start, whose reflections undo each other.
    Cost: r in parameters and 2 r in multiply-adds a token; convolutions change their weight instead.
    Start: equals the base layer up to rounding for an even r. For an odd one, and with `apply_GS`, it does not: one
    reflection is left, or r of different directions.
    Merge: exact up to rounding of the dtype.
    Raises: ConfigError with `apply_GS` where r exceeds the width.
    Source: Yuan et al. 2024, arXiv:2405.17484, section 3.1; the product: Bischof and Van Loan 1987.
    """

    def __init__(self, site: Site, config: HRAConfig) -> None:
        super().__init__(site, config)
        self.config = config
        width = site.shape[0] if site.kind == "embedding" else site.shape[1]
        if config.apply_GS and config.r > width:
            raise ConfigError(
                f"r={config.r} with apply_GS: a layer of width {width} has room for no more orthogonal vectors than "
                "that. Lower r, or leave apply_GS out."
            )
        self.starts_as_base = config.init_weights and config.r % 2 == 0 and not config.apply_GS
        self.normals = nn.Parameter(torch.empty(*site.batch, width, config.r))

    def reset(self) -> None:
        for normals in self.normals.detach().view(-1, *self.normals.shape[-2:]):
            nn.init.kaiming_uniform_(normals, a=math.sqrt(5))
            if self.starts_as_base:
                normals[:, 1::2] = normals[:, ::2]

    def factors(self, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """(in, r) and (r, in), whose product is what a row loses when it passes H_1 to H_r, or H_r to H_1."""
        if self.config.apply_GS:
            q = torch.linalg.qr(self.normals).Q
            return q, 2 * q.mT
        u = self.normals / torch.linalg.vector_norm(self.normals, dim=-2, keepdim=True)
        with torch.autocast(u.device.type, enabled=False):  # equal normals have to cancel
            inverse = (u.mT @ u).triu(1) + 0.5 * torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        return u, torch.linalg.solve_triangular(inverse.mT if reverse else inverse, u.mT, upper=not reverse)

    def reflected(self, rows: Tensor, *, reverse: bool = False) -> Tensor:
        u, v = self.factors(reverse=reverse)
        return rows - (rows @ u) @ v

    def adapt(self, weight: Tensor) -> Tensor:
        weight = weight.to(self.normals.dtype)
        return self.reflected(weight.mT).mT if self.site.kind == "embedding" else self.reflected(weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        dtype, device = self.normals.dtype, self.normals.device
        if self.site.kind == "linear":
            return base(self.reflected(x.to(device, dtype), reverse=True).to(x.dtype))
        if isinstance(self.site, EmbeddingSite):
            y = base(x)
            return self.site.without_padding(x, self.reflected(y.to(dtype)).to(y.dtype))
        return super().forward(x, base)

    def to_file(self) -> dict[str, Tensor]:
        return {"hra_u": self.normals}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("normals", tensors["hra_u"])


@register("hra")
@dataclass
class HRAConfig(WeightConfig):
    """Configuration of `Hra`, field by field that of `peft`.

    Args:
        r: Number of reflections; an even one starts as the base model.
        apply_GS: Make the normals orthogonal (Gram-Schmidt), which starts as another model.
        init_weights: Start with pairs that undo each other; False starts with random normals (for tests).

    Raises:
        ConfigError: `r` is not positive.
    """

    adapter = Hra
    peft_name = "HRA"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only
    own_fields = frozenset({"fan_in_fan_out"})

    r: int = 8
    apply_GS: bool = False  # noqa: N815  # peft's name
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
