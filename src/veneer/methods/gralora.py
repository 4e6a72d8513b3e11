"""GraLoRA: a low-rank pair for every block of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter, onto
from veneer.config import WeightConfig, check_positive, check_shares, own
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import LinearSite, Site


class Gralora(WeightAdapter):
    r"""Cuts the weight into k x k blocks and adds a product of rank r / k to each.

        W'_mn = W_mn + s (down_nm up_mn)^T,     s = alpha / (r + hybrid_r)

    m and n count blocks of outputs and of inputs. With `hybrid_r`, s wide_up wide_down is added to the whole.

    Trains: down (k, in / k, r), the block of inputs first, its columns in k groups, one for each block of outputs;
    up (k, r, out / k), the block of outputs first, zero at the start; wide_down (hybrid_r, in) and wide_up
    (out, hybrid_r), zero at the start.
    Cost: (r + hybrid_r)(in + out) parameters and 2 r (in + out) multiply-adds a token, as LoRA, of k times its rank.
    Dropout acts on the input of the change, in training only.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a convolution the inputs are those of its kernel, channel by channel.
    Raises: ConfigError where k does not divide the sides of the weight.
    Source: Jung et al. 2025, arXiv:2505.20355, section 3.2; hybrid: section 3.3.
    """

    kinds = frozenset({"linear", "conv", "parameter"})

    def __init__(self, site: Site, config: GraloraConfig) -> None:
        super().__init__(site, config)
        out_features, in_features = site.shape
        k, r, wide = config.gralora_k, config.r, config.hybrid_r
        if in_features % k or out_features % k:
            raise ConfigError(
                f"gralora_k={k} does not divide a layer whose weight is {out_features} x {in_features}. Choose one "
                "that divides both sides of every layer, or leave this one out."
            )
        self.config = config
        self.starts_as_base = config.init_weights
        self.k = k
        self.scaling = config.alpha / (r + wide)
        self.dropout = self.input_dropout(config.gralora_dropout, "gralora_dropout")
        self.down = nn.Parameter(torch.empty(*site.batch, k, in_features // k, r))
        self.up = nn.Parameter(torch.empty(*site.batch, k, r, out_features // k))
        self.wide_down = nn.Parameter(torch.empty(*site.batch, wide, in_features)) if wide else None
        self.wide_up = nn.Parameter(torch.empty(*site.batch, out_features, wide)) if wide else None

    def reset(self) -> None:
        for down, up, inputs in (
            (self.down, self.up, self.down.shape[-2]),
            (self.wide_down, self.wide_up, self.site.shape[1]),
        ):
            if down is None or up is None:
                continue
            nn.init.uniform_(down, -(inputs**-0.5), inputs**-0.5)
            bound = 0.0 if self.config.init_weights else (up.shape[-1] if up is self.wide_up else up.shape[-2]) ** -0.5
            nn.init.uniform_(up, -bound, bound)

    def change(self) -> Tensor:
        """What is added to the weight, `(out, in)`, not yet scaled."""
        down = self.down.unflatten(-1, (self.k, -1))  # (n, in / k, m, r / k)
        up = self.up.unflatten(-2, (self.k, -1))  # (m, n, r / k, out / k)
        blocks = torch.einsum("...nims,...mnso->...moni", down, up)
        change = blocks.flatten(-4, -3).flatten(-2)
        if self.wide_down is None or self.wide_up is None:
            return change
        return change + self.wide_up @ self.wide_down

    def adapt(self, weight: Tensor) -> Tensor:
        return onto(self.scaling * self.change(), weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        site = self.site
        if not isinstance(site, LinearSite):
            if not self.dropout or not self.training:
                return super().forward(x, base)
            change = site.apply(F.dropout(x, self.dropout), self.scaling * self.change(), None, base.args, base.kwargs)
            return base(x) + change
        y = base(x)
        x = x.to(self.down.device, self.down.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        parts = x.reshape(-1, self.k, self.down.shape[-2]).transpose(0, 1)  # (n, tokens, in / k)
        hidden = torch.bmm(parts, self.down)  # (n, tokens, r), its columns by block of outputs
        hidden = hidden.unflatten(-1, (self.k, -1)).permute(2, 1, 0, 3).flatten(-2)  # (m, tokens, r)
        if y.dtype == self.up.dtype:  # adds onto y at once
            outputs = y.reshape(-1, self.k, self.up.shape[-1]).transpose(0, 1)  # (m, tokens, out / k)
            y = torch.baddbmm(outputs, hidden, self.up, alpha=self.scaling).transpose(0, 1).reshape(y.shape)
        else:
            delta = torch.bmm(hidden, self.up).transpose(0, 1).reshape(y.shape)
            y = y + (self.scaling * delta).to(y.dtype)
        if self.wide_down is None or self.wide_up is None:
            return y
        return site.add_factored(x, y, self.wide_down, self.wide_up, self.scaling)

    # Layout of peft.

    NAMES = {  # noqa: RUF012  # read only
        "gralora_A": "down",
        "gralora_B": "up",
        "gralora_A_general.weight": "wide_down",
        "gralora_B_general.weight": "wide_up",
    }

    def to_file(self) -> dict[str, Tensor]:
        named = {key: getattr(self, name) for key, name in self.NAMES.items()}
        return {key: tensor for key, tensor in named.items() if tensor is not None}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            self.put(self.NAMES[key], tensor)


@register("gralora")
@dataclass
class GraloraConfig(WeightConfig):
    """Configuration of `Gralora`, field by field that of `peft`.

    Args:
        r: Rank of all blocks of a row together.
        hybrid_r: Rank of a LoRA of the whole weight beside the blocks.
        alpha: Numerator of the scaling.
        gralora_dropout: Share of the input that is dropped in training.
        gralora_k: Blocks along each side of the weight.
        init_weights: True starts with up = 0, False with random factors (for tests).

    Raises:
        ConfigError: Blocks that do not divide the rank, a number out of range, or a dropout outside [0, 1).
    """

    adapter = Gralora
    peft_name = "GRALORA"

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    init_weights: bool = True
    exclude_modules: list[str] | str | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "gralora_k")
        check_shares(self, "gralora_dropout")
        if self.hybrid_r < 0:
            raise ConfigError(f"GraloraConfig: hybrid_r={self.hybrid_r}; zero or a positive number was expected.")
        if self.r % self.gralora_k:
            raise ConfigError(f"GraloraConfig: gralora_k={self.gralora_k} does not divide r={self.r}.")
