"""DEFT: a few directions of the output are taken out of the weight and filled anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import WeightConfig, check_positive, check_shares
from veneer.registry import register
from veneer.sites import EmbeddingSite, LinearSite, Site


class Deft(WeightAdapter):
    r"""Removes what the weight does in r trained directions of the output, and puts something else there.

        W' = W - Q K^T W + s Q R,     s = alpha / r,  or 1 without alpha
        Q = P, K = relu(P) (`relu`),     Q = K = the orthonormal factor of P (`qr`)

    With `para`, which is the method PaRa, nothing is put there: W' = W - Q K^T W. Dropout acts on the input of R, in
    training only. r is at most out.

    Trains: directions P (out, r), normal with deviation 0.02; content R (r, in), K^T W / s at the start.
    Cost: r (in + out) parameters and r (in + 2 out) multiply-adds a token; convolutions change their weight instead.
    Start: equals the base layer up to rounding; with `para`, or a random R, it does not.
    Merge: exact up to rounding of the dtype.
    Source: Kumar et al. 2025, arXiv:2509.22793; PaRa: Chen et al. 2024, arXiv:2406.05641.
    """

    def __init__(self, site: Site, config: DeftConfig) -> None:
        super().__init__(site, config)
        self.config = config
        out_features, in_features = site.shape
        rank = min(config.r, out_features)
        self.scaling = config.alpha / rank if config.alpha else 1.0
        self.dropout = self.input_dropout(config.deft_dropout, "deft_dropout")
        self.starts_as_base = config.init_weights and not config.para
        self.directions = nn.Parameter(torch.empty(*site.batch, out_features, rank))
        self.content = None if config.para else nn.Parameter(torch.empty(*site.batch, rank, in_features))

    @torch.no_grad()
    def reset(self) -> None:
        nn.init.normal_(self.directions, std=0.02)
        if self.content is None:
            return
        if self.config.init_weights:
            _, keys = self.subspace()
            self.content.copy_(keys.mT @ self.site.read().to(keys.dtype) / self.scaling)
        else:
            nn.init.normal_(self.content, std=0.02 * self.config.init_scale)

    def subspace(self) -> tuple[Tensor, Tensor]:
        """Q and K, each (out, r)."""
        if self.config.decomposition_method == "relu":
            return self.directions, self.directions.relu()
        q = torch.linalg.qr(self.directions).Q
        return q, q

    def adapt(self, weight: Tensor) -> Tensor:
        q, keys = self.subspace()
        weight = weight.to(q.dtype)
        change = -keys.mT @ weight
        if self.content is not None:
            change = change + self.scaling * self.content
        return weight + q @ change

    def forward(self, x: Tensor, base: Base) -> Tensor:
        site, content = self.site, self.content
        if site.kind == "parameter":
            return super().forward(x, base)
        q, keys = self.subspace()
        dropped = x
        if x.is_floating_point():
            dropped = F.dropout(x.to(q.device, q.dtype), self.dropout, self.training)
        if not isinstance(site, LinearSite | EmbeddingSite) or not site.is_plain:
            weight = base.weight().to(q.dtype)
            y = site.apply(x, weight - q @ (keys.mT @ weight), base.bias(), base.args, base.kwargs)
            return y if content is None else site.add_factored(dropped, y, content, q, self.scaling)
        y, bias = base(x), base.bias()
        wide = y.to(q.dtype)
        change = -(wide @ keys)  # what the weight does in the directions of K; what the bias does stays
        if bias is not None:
            change = change + bias.to(q.dtype) @ keys
        if isinstance(site, LinearSite) and content is not None:
            change = change + self.scaling * F.linear(dropped, content)
        rows, change = wide.reshape(-1, wide.shape[-1]), change.reshape(-1, change.shape[-1])
        y = torch.addmm(rows, change, q.t()).view(y.shape).to(y.dtype)
        if not isinstance(site, EmbeddingSite):
            return y
        return site.without_padding(x, y if content is None else site.add_factored(x, y, content, q, self.scaling))

    def to_file(self) -> dict[str, Tensor]:
        content = {} if self.content is None else {"deft_R": self.content}
        return {"deft_P": self.directions, **content}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("directions", tensors["deft_P"])
        if self.content is not None:
            self.put("content", tensors["deft_R"])


@register("deft")
@dataclass
class DeftConfig(WeightConfig):
    """Configuration of `Deft`, field by field that of `peft`.

    Args:
        r: Number of directions.
        decomposition_method: How Q and K come from P: `"relu"`, or `"qr"` for an orthogonal projection.
        init_scale: Factor of the random content, with `init_weights=False`.
        alpha: Numerator of the scaling of the content; none or 0 for no scaling.
        para: Only take out (PaRa).
        deft_dropout: Share of the content's input that is dropped in training.
        init_weights: Start as the base layer; False starts with small random content.

    Raises:
        ConfigError: A value is out of its range.
    """

    adapter = Deft
    peft_name = "DEFT"

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "init_scale")
        check_shares(self, "deft_dropout")
