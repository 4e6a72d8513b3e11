"""PSOFT: a rotation within the weight's principal subspace."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig, check_positive, check_shares
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.rotations import above_diagonal, cayley, cayley_neumann, skew
from veneer.sites import Site


class Psoft(WeightAdapter):
    r"""Turns and scales the coordinates in which the r largest singular values of the weight act.

        W = U S V^T,     W' = W + s B (diag(b) R diag(a) - I) A,     s = alpha / r
        R = (I + Q)(I - Q)^-1,     Q = -Q^T
        A = V_r^T, B = U_r S_r / s (`psoft_init`),     A = (S_r / s)^1/2 V_r^T, B = U_r (S_r / s)^1/2 (`pissa_init`)

    In both forms s cancels, so that alpha has no influence. Without `psoft_orth` R is any matrix; with Cayley-Neumann
    it is (I + Q)(I + Q + Q^2 + ...), cut off, where Q may be scaled down to a length below 1. Dropout acts on the input
    of A, in training only.

    Trains: rotation (r (r - 1) / 2,), zero, or (r, r), the identity, at the start; a (r,) and b (r,), ones.
    Cost: r (r - 1) / 2 + 2 r parameters, r (in + out + r) multiply-adds a token and as many numbers in memory; one
    decomposition when the adapter is made or loaded. The file keeps one number for each singular vector, which tells
    its sign.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if r > min(in, out).
    Source: Wu et al. 2025, arXiv:2505.11235.
    """

    optional = frozenset({"psoft_signs"})
    down: Tensor
    up: Tensor
    places: Tensor

    def __init__(self, site: Site, config: PsoftConfig) -> None:
        super().__init__(site, config)
        self.config = config
        out_features, in_features = site.shape
        rank = config.r
        if rank > min(site.shape):
            raise ConfigError(f"r={rank}, but the layer is {site.shape}; at most {min(site.shape)} was expected.")
        self.scaling = config.psoft_alpha / rank
        self.dropout = self.input_dropout(config.psoft_dropout, "psoft_dropout")
        shape = (rank * (rank - 1) // 2,) if config.psoft_orth else (rank, rank)
        self.rotation = nn.Parameter(torch.empty(*site.batch, *shape))
        self.input_scale = nn.Parameter(torch.empty(*site.batch, rank)) if config.psoft_mag_a else None
        self.output_scale = nn.Parameter(torch.empty(*site.batch, rank)) if config.psoft_mag_b else None
        # A and B follow from the weight, so they stand in no file.
        self.register_buffer("down", torch.empty(*site.batch, rank, in_features), persistent=False)
        self.register_buffer("up", torch.empty(*site.batch, out_features, rank), persistent=False)
        self.register_buffer("places", above_diagonal(rank), persistent=False)

    def reset(self) -> None:
        with torch.no_grad():
            nn.init.normal_(self.rotation, std=0 if self.config.init_weights else 0.1)
            if not self.config.psoft_orth:
                self.rotation.add_(torch.eye(self.config.r, dtype=self.rotation.dtype, device=self.rotation.device))
            for scale in (self.input_scale, self.output_scale):
                if scale is not None:
                    nn.init.ones_(scale)
        self._decompose(None)

    @torch.no_grad()
    def _decompose(self, signs: Tensor | None) -> None:
        """Makes A and B. Singular vectors have a sign by chance: `signs` holds the sums that those of the file had."""
        weight, rank = self.site.read(), self.config.r
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.config.psoft_svd == "full":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            u, s, vh = u[..., :rank], s[..., :rank] / self.scaling, vh[..., :rank, :]
        else:
            devices = [] if weight.device.type == "cpu" else [weight.device]
            with torch.random.fork_rng(devices, device_type="cuda" if not devices else weight.device.type):
                torch.manual_seed(self.config.random_seed)
                u, s, v = torch.svd_lowrank(weight, q=rank, niter=self.config.psoft_svd_lowrank_niter)
            s, vh = s / self.scaling, v.mT
        if signs is not None:
            turned = torch.where(vh.sum(-1) * signs.to(vh) < 0, -1.0, 1.0).to(vh.dtype)
            u, vh = u * turned.unsqueeze(-2), vh * turned.unsqueeze(-1)
        if self.config.ab_svd_init == "psoft_init":
            self.put("up", (u * s.unsqueeze(-2)).contiguous())
        else:
            self.put("up", (u * s.sqrt().unsqueeze(-2)).contiguous())
            vh = s.sqrt().unsqueeze(-1) * vh
        self.put("down", vh.contiguous())

    def change(self) -> Tensor:
        """diag(b) R diag(a) - I, `(r, r)`."""
        config, turn = self.config, self.rotation
        eye = torch.eye(config.r, dtype=turn.dtype, device=turn.device)
        matrix: Tensor = turn
        if config.psoft_orth:
            q = skew(turn, self.places, config.r)
            if not config.use_cayley_neumann:
                matrix = cayley(-q)
            else:
                if config.cayley_neumann_eps is not None:
                    length = torch.linalg.matrix_norm(q, keepdim=True)
                    q = q * (config.cayley_neumann_eps / (length + 1e-12)).clamp_max(1)
                matrix = cayley_neumann(q, config.num_cayley_neumann_terms)
        if self.output_scale is not None:
            matrix = self.output_scale.unsqueeze(-1) * matrix
        if self.input_scale is not None:
            matrix = matrix * self.input_scale.unsqueeze(-2)
        return matrix - eye

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.scaling * (self.up @ self.change() @ self.down)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "parameter":
            return super().forward(x, base)
        y, change = base(x), self.change()
        if x.is_floating_point():
            x = F.dropout(x.to(self.down.device, self.down.dtype), self.dropout, self.training)
        if self.site.kind == "linear":  # in the subspace, where it costs least
            return self.site.add_factored(F.linear(x, self.down), y, change, self.up, self.scaling)
        return self.site.add_factored(x, y, self.down, self.up @ change, self.scaling)

    def to_file(self) -> dict[str, Tensor]:
        tensors = {"weight": self.rotation, "vector_a": self.input_scale, "vector_b": self.output_scale}
        named = {f"psoft_R.{name}": tensor for name, tensor in tensors.items() if tensor is not None}
        return {**named, "psoft_signs": self.down.sum(-1)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, own in (("weight", "rotation"), ("vector_a", "input_scale"), ("vector_b", "output_scale")):
            if f"psoft_R.{name}" in tensors:
                self.put(own, tensors[f"psoft_R.{name}"])
        self._decompose(tensors.get("psoft_signs"))


@register("psoft")
@dataclass
class PsoftConfig(ModuleConfig):
    """Configuration of `Psoft`, field by field that of `peft`.

    Args:
        r: Dimension of the subspace.
        psoft_alpha: Kept for `peft`'s files; it cancels.
        psoft_dropout: Share of the input that is dropped in training.
        fan_in_fan_out: Kept for `peft`'s files; how a layer stores its weight is seen from the layer.
        ab_svd_init: Which side carries the singular values: B (`"psoft_init"`), or both their roots (`"pissa_init"`).
        psoft_svd: `"full"`, or `"lowrank"` for an approximate decomposition.
        psoft_svd_lowrank_niter: Iterations of the approximate decomposition.
        random_seed: Its seed, from which a loaded adapter makes it again.
        psoft_orth: Keep R orthogonal.
        psoft_mag_b: Scale what R gives.
        psoft_mag_a: Scale what R gets.
        use_cayley_neumann: Cut the inverse of the Cayley transform off.
        num_cayley_neumann_terms: After so many terms.
        cayley_neumann_eps: Largest length of Q with it, between 0 and 1; none for any.
        init_weights: Start as the base layer; False starts with a small random rotation (for tests).

    Raises:
        ConfigError: A value is out of its range.
    """

    adapter = Psoft
    peft_name = "PSOFT"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "psoft_alpha", "num_cayley_neumann_terms")
        check_shares(self, "psoft_dropout")
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ConfigError(
                f"PsoftConfig: cayley_neumann_eps={self.cayley_neumann_eps!r}; a number between 0 and 1 was expected."
            )

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        yield from super().unused(paths)
        series = (self.num_cayley_neumann_terms, self.cayley_neumann_eps)
        if series != (5, None) and not (self.use_cayley_neumann and self.psoft_orth):
            yield "num_cayley_neumann_terms and cayley_neumann_eps: without use_cayley_neumann they change nothing."
        if self.psoft_svd == "full" and self.psoft_svd_lowrank_niter != 10:
            yield "psoft_svd_lowrank_niter: without psoft_svd='lowrank' it changes nothing."
