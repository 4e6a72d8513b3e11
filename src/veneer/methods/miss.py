"""MiSS: one small matrix that all shards of the weight share; successor of Bone, with its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import WeightConfig, check_positive, check_shares, own
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import LinearSite, Site


class Miss(WeightAdapter):
    r"""Adds the same small matrix to every r columns of the weight.

        plain:  W'[o, i] = W[o, i] + block[i mod r, o]
        mini:   W'[o, i] = W[o, i] + block[i mod r, o mod mini_r]
        bat:    W'_mn = W_mn + W_mn block_m + block_m,    W_mn the r x r blocks of W, m over outputs

    Trains: block, zero at the start: plain (r, out), mini (r, mini_r), bat (out / r, r, r).
    Cost: r out, r mini_r, or r out parameters. Plain and mini sum the r shards of the input before they multiply it:
    in + r out, or in + r mini_r, a token; bat multiplies the weight's blocks, r in out, once a call.
    Dropout acts on the input of the change, in training only.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own block.
    Raises: ConfigError where r is above `in`, mini_r does not divide `out`, or (bat) r does not divide both.
    Source: Kang and Yin 2024, arXiv:2409.15371, eq. 3 to 6 (bat: Bat of Bone, its first version).
    """

    kinds = frozenset({"linear", "conv", "parameter"})

    def __init__(self, site: Site, config: MissConfig) -> None:
        super().__init__(site, config)
        out_features, in_features = site.shape
        r, variant = config.r, config.init_weights
        size = f"a layer whose weight is {out_features} x {in_features}"
        if r > in_features:
            raise ConfigError(f"r={r} is more than the inputs of {size}. Lower r, or leave this layer out.")
        if variant == "bat" and (in_features % r or out_features % r):
            raise ConfigError(f'init_weights="bat": r={r} does not divide both sides of {size}. Choose one that does.')
        if variant == "mini" and out_features % config.mini_r:
            raise ConfigError(f"mini_r={config.mini_r} does not divide the outputs of {size}. Choose one that does.")
        self.r = r
        self.variant = variant
        self.starts_as_base = variant is not False
        self.dropout = self.input_dropout(config.miss_dropout, "miss_dropout")
        shape = {"bat": (out_features // r, r, r), "mini": (r, config.mini_r)}.get(str(variant), (r, out_features))
        self.block = nn.Parameter(torch.empty(*site.batch, *shape))

    def reset(self) -> None:
        bound = 0.0 if self.variant else self.block.shape[-1] ** -0.5
        nn.init.uniform_(self.block, -bound, bound)

    def adapt(self, weight: Tensor) -> Tensor:
        in_features = self.site.shape[1]
        if self.variant == "bat":
            rows = weight.reshape(-1, in_features, self.r)  # (m, in, r): r rows of n pieces each
            change = torch.bmm(rows.to(self.block.dtype), self.block.reshape(-1, self.r, self.r))
            pieces = change.reshape(*self.block.shape[:-1], in_features // self.r, self.r)  # (m, r, n, r)
            return weight + (pieces + self.block.unsqueeze(-2)).reshape(weight.shape)
        return weight + self._tiled()

    def _tiled(self) -> Tensor:
        """The block, repeated over the whole weight."""
        out_features, in_features = self.site.shape
        rows = self.block.mT.repeat(*[1] * len(self.site.batch), out_features // self.block.shape[-1], 1)
        return rows.repeat(*[1] * (rows.dim() - 1), -(-in_features // self.r))[..., :in_features]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        site = self.site
        dropped = bool(self.dropout) and self.training
        if self.variant == "bat" or not isinstance(site, LinearSite):
            if not dropped:
                return super().forward(x, base)
            weight = base.weight()
            change = site.apply(F.dropout(x, self.dropout), self.adapt(weight) - weight, None, base.args, base.kwargs)
            return base(x) + change
        y = base(x)
        x = x.to(self.block.device, self.block.dtype)
        if dropped:
            x = F.dropout(x, self.dropout)
        if site.shape[1] % self.r:
            x = F.pad(x, (0, -site.shape[1] % self.r))
        shards = x.unflatten(-1, (-1, self.r)).sum(-2)
        change = (shards @ self.block).to(y.dtype)
        if self.variant == "mini":
            return (y.unflatten(-1, (-1, change.shape[-1])) + change.unsqueeze(-2)).flatten(-2)
        return y + change

    def to_file(self) -> dict[str, Tensor]:
        return {"miss_block": self.block}

    def from_file(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        self.put("block", tensors["miss_block"])


@register("miss")
@dataclass
class MissConfig(WeightConfig):
    """Configuration of `Miss`, field by field that of `peft`.

    Args:
        r: Rows of the block: the rank of the change.
        miss_dropout: Share of the input that is dropped in training.
        mini_r: Columns of the block in the variant mini.
        init_weights: The variant and its starting values: True for the plain one, `"mini"`, `"bat"`, or False for the
            plain one with a random block (for tests).

    Raises:
        ConfigError: A size that is not positive, a dropout outside [0, 1), or another variant.
    """

    adapter = Miss
    peft_name = "MISS"

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True
    fan_in_fan_out: bool = own(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "mini_r")
        check_shares(self, "miss_dropout")
