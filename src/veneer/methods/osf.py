"""OSF: the lesser part of the weight's singular value decomposition is trained, across what the greater part holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter, onto
from veneer.config import ModuleConfig, check_expression, own, planned
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import LinearSite, Site


class Osf(WeightAdapter):
    r"""Trains the singular triplets of the weight behind the first k, with gradients across those.

        W' = W - sum_(i > k) s_i u_i v_i^T + U diag(S) V

    The gradient of U loses its part in the span of u_1 .. u_k, that of V its part in the span of v_1 .. v_k, so that
    what the first triplets hold is left alone, as in learning one task after the other. The values themselves are not
    projected.

    Trains: U (out, m), S (m,), V (m, in), m = min(in, out) - k: the triplets behind the first k at the start.
    Cost: m (in + out + 1) parameters, more than half of the layer's at the default k; and as much memory again as the
    layer takes, for W without these triplets, and k (in + out) numbers for the first ones. Time: m (in + out)
    multiply-adds a token, or in out m a call, whichever is less.
    Start: equals the base layer up to rounding. Merge: exact up to rounding of the dtype.
    Files hold U, S and V; the rest is computed again from the base weight, by a decomposition of every layer.
    Raises: ConfigError where k leaves nothing to train.
    Source: Nayak et al. 2025, arXiv:2504.07097, section 3.2, algorithm 1.
    """

    kinds = frozenset({"linear", "conv", "parameter"})
    rest: Tensor
    high_u: Tensor
    high_v: Tensor

    def __init__(self, site: Site, config: OSFConfig) -> None:
        super().__init__(site, config)
        out_features, in_features = site.shape
        whole = min(site.shape)
        k = high_rank(config.effective_rank, whole)
        if not 0 < k < whole:
            raise ConfigError(
                f"effective_rank={config.effective_rank} freezes {k} of the {whole} singular triplets of a layer whose "
                f"weight is {out_features} x {in_features}; at least one has to be frozen and one trained."
            )
        self.starts_as_base = config.init_weights is not False
        self.u = nn.Parameter(torch.empty(*site.batch, out_features, whole - k))
        self.s = nn.Parameter(torch.empty(*site.batch, whole - k))
        self.v = nn.Parameter(torch.empty(*site.batch, whole - k, in_features))
        self.register_buffer("rest", torch.empty(*site.batch, out_features, in_features))
        self.register_buffer("high_u", torch.empty(*site.batch, out_features, k))
        self.register_buffer("high_v", torch.empty(*site.batch, k, in_features))

    @torch.no_grad()
    def reset(self) -> None:
        for tensor, start in zip((self.u, self.s, self.v), self.decompose(), strict=True):
            if self.starts_as_base:
                tensor.copy_(start)
            else:
                nn.init.normal_(tensor)

    def decompose(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fills what is frozen; returns the triplets behind the first k."""
        weight = self.site.read()
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        dtype, k = self.high_u.dtype, self.high_u.shape[-1]
        u, s, v = u.to(dtype), s.to(dtype), v.to(dtype)
        low = u[..., k:], s[..., k:], v[..., k:, :]
        rest = weight.to(dtype) - (low[0] * low[1].unsqueeze(-2)) @ low[2]
        for name, tensor in (("high_u", u[..., :k]), ("high_v", v[..., :k, :]), ("rest", rest)):
            self.put(name, tensor.contiguous())  # as they lie where they were made, so that sums are the same
        return low

    def factors(self) -> tuple[Tensor, Tensor]:
        """U diag(S) and V, with their gradients across the frozen triplets."""
        u: Tensor = Across.apply(self.u, self.high_u)
        v: Tensor = Across.apply(self.v.mT, self.high_v.mT)
        return u * self.s.unsqueeze(-2), v.mT

    def adapt(self, weight: Tensor) -> Tensor:
        up, down = self.factors()
        return weight + (self.rest - self.site.read().to(self.rest.dtype)) + up @ down

    def forward(self, x: Tensor, base: Base) -> Tensor:
        site = self.site
        if base.below:
            return super().forward(x, base)
        up, down = self.factors()
        bias = base.bias()
        out_features, in_features = site.shape
        few = x.numel() * (in_features + out_features) < out_features * in_features * in_features
        if isinstance(site, LinearSite) and few:
            y = site.apply(x, self.rest, bias, base.args, base.kwargs)
            return site.add_factored(x, y, down, up)
        return site.apply(x, onto(up @ down, self.rest), bias, base.args, base.kwargs)

    # Layout of peft.

    def to_file(self) -> dict[str, Tensor]:
        return {"osf_svd_params.U_low": self.u, "osf_svd_params.S_low": self.s, "osf_svd_params.V_low": self.v}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.decompose()
        for name, key in (("u", "U"), ("s", "S"), ("v", "V")):
            self.put(name, tensors[f"osf_svd_params.{key}_low"])


class Across(torch.autograd.Function):
    """Passes a factor on; its gradient loses what lies in the span of the columns of another."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(high)
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (high,) = ctx.saved_tensors
        return gradient - high @ (high.mT @ gradient), None


def high_rank(asked: float | None, whole: int) -> int:
    """How many of all triplets are frozen: half by default, a share if it is a fraction, else as many as is said."""
    if asked is None:
        return whole // 2
    if isinstance(asked, float) and 0 < asked <= 1:
        return int(whole * asked)
    return min(int(asked), whole)


@register("osf")
@dataclass
class OSFConfig(ModuleConfig):
    """Configuration of `Osf`, field by field that of `peft`.

    Args:
        effective_rank: Triplets that are frozen: a number, or a fraction of all; half of them if none.
        rank_pattern: The same for single places, by a regular expression that is found in their path.
        init_weights: False starts with random triplets (for tests).

    Raises:
        ConfigError: A rank that is not positive.
    """

    adapter = Osf
    peft_name = "OSF"
    default_targets = ("all-linear",)
    learning_rates = {"classification": 5e-5, "causal-lm": 2e-5}  # noqa: RUF012  # it trains most of the weight

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = planned(None, "a table of ranks that peft makes no use of")
    exclude_modules: list[str] | str | None = own(None)
    layers_to_transform: list[int] | int | None = own(None)
    layers_pattern: list[str] | str | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.rank_pattern or ():
            check_expression("rank_pattern", pattern)
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if rank is not None and rank <= 0:
                raise ConfigError(f"OSFConfig: a rank of {rank!r}; a positive number was expected.")

    def at(self, path: str) -> Self:
        ranks = [rank for pattern, rank in (self.rank_pattern or {}).items() if re.search(pattern, path)]
        return replace(self, effective_rank=ranks[0]) if ranks else self

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        idle = [one for one in self.rank_pattern or () if not any(re.search(one, path) for path in paths)]
        if idle:
            yield f"rank_pattern: {idle} match none of the adapted modules."
