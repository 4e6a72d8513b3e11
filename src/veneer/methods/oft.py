"""OFT: orthogonal fine-tuning, with its constrained, shared and approximate forms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import WeightConfig, check_shares
from veneer.errors import ConfigError, VeneerWarning
from veneer.registry import register
from veneer.rotations import above_diagonal, cayley, cayley_neumann, nearest_divisor, skew, turn
from veneer.sites import EmbeddingSite, Site


class Oft(WeightAdapter):
    r"""Turns the input of the layer, block by block, by trained rotations.

        W' = W R^T,     R = diag(R_1, ..., R_r),     R_i = (I - Q_i)(I + Q_i)^-1,     Q_i = -Q_i^T

    On an embedding the looked-up vectors are turned, W' = R^T W. With Cayley-Neumann, the default, the inverse is a
    series that is cut off, R_i = (I + Q)(I + Q + Q^2 + ...), so that R_i is orthogonal only nearly. With `coft` every
    Q_i is scaled down to a length of at most eps / sqrt(r). `block_share` uses one R_i for all blocks. Dropout replaces
    R_i by I, each block with that probability, in training only.

    Trains: rotation (r, b (b - 1) / 2), the entries of each Q_i above its diagonal, zero at the start; b = in / r.
    Cost: r b (b - 1) / 2 parameters and in b multiply-adds a token; convolutions turn their weight instead.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError where the width has no divisor near the block size.
    Source: Qiu et al. 2023, arXiv:2306.07280, section 3; Cayley-Neumann: Qiu et al. 2025, arXiv:2506.19847.
    """

    places: Tensor

    def __init__(self, site: Site, config: OFTConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.width = width = site.shape[0] if site.kind == "embedding" else site.shape[1]
        if config.r:
            self.size = width // nearest_divisor(width, config.r, "r")
        else:
            self.size = nearest_divisor(width, config.oft_block_size, "oft_block_size")
        if self.size == 1:
            raise ConfigError(f"r={config.r} leaves blocks of one number in a layer of width {width}. Lower r.")
        count = 1 if config.block_share else width // self.size
        self.rotation = nn.Parameter(torch.empty(*site.batch, count, self.size * (self.size - 1) // 2))
        self.register_buffer("places", above_diagonal(self.size), persistent=False)

    def reset(self) -> None:
        count, size = self.width // self.size, self.size
        if self.config.oft_block_size not in (0, size) or self.config.r not in (0, count):
            warnings.warn(
                f"OFTConfig: oft_block_size={self.config.oft_block_size}, r={self.config.r} does not divide the width "
                f"of {self.width}: {count} blocks of {size} are taken there.",
                VeneerWarning,
                stacklevel=6,
            )
        if self.config.init_weights:
            nn.init.zeros_(self.rotation)
        else:
            nn.init.normal_(self.rotation, std=0.1)

    def blocks(self) -> Tensor:
        """R_1 to R_r, `(r, b, b)`; one where it is shared."""
        entries: Tensor = self.rotation
        if self.config.coft:
            # The gradient is taken where the forward pass is, and passed on as it is.
            entries = entries + (self.projected() - entries).detach()
        q = skew(entries, self.places, self.size)
        if self.config.use_cayley_neumann:
            blocks = cayley_neumann(q, self.config.num_cayley_neumann_terms)
        else:
            blocks = cayley(q)
        if self.training and self.config.module_dropout and not self.config.block_share:
            dropped = torch.rand(*blocks.shape[:-2], 1, 1, device=blocks.device) < self.config.module_dropout
            blocks = torch.where(dropped, torch.eye(self.size, dtype=blocks.dtype, device=blocks.device), blocks)
        return blocks

    def projected(self) -> Tensor:
        """The trained numbers, each block's no longer than `coft` allows."""
        limit = self.config.eps / math.sqrt(self.rotation.shape[-2])
        length = math.sqrt(2) * torch.linalg.vector_norm(self.rotation, dim=-1, keepdim=True)  # of the whole Q_i
        return self.rotation * (limit / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)

    @classmethod
    def allocate(cls, adapters: Mapping[str, Self], config: OFTConfig, step: int) -> None:
        if config.coft:
            with torch.no_grad():
                for adapter in adapters.values():
                    adapter.rotation.copy_(adapter.projected())

    def adapt(self, weight: Tensor) -> Tensor:
        blocks = self.blocks()
        if self.site.kind == "embedding":
            return turn(weight.mT.to(blocks.dtype), blocks).mT
        return turn(weight.to(blocks.dtype), blocks.mT)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "linear":
            return base(self.turned(x))
        if isinstance(self.site, EmbeddingSite):
            return self.site.without_padding(x, self.turned(base(x)))
        return super().forward(x, base)

    def turned(self, x: Tensor) -> Tensor:
        blocks = self.blocks()
        return turn(x.to(blocks.device, blocks.dtype).reshape(-1, x.shape[-1]), blocks).view(x.shape).to(x.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {f"oft_{'embedding_' if self.site.kind == 'embedding' else ''}R.weight": self.rotation}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("rotation", next(iter(tensors.values())))


@register("oft")
@dataclass
class OFTConfig(WeightConfig):
    """Configuration of `Oft`, field by field that of `peft`.

    Blocks divide the width: where the size or number asked for does not, the divisor nearest to it is taken, the
    smaller of two, with a warning.

    Args:
        r: Number of blocks; 0 where `oft_block_size` is given.
        oft_block_size: Width of a block; 0 where `r` is given.
        module_dropout: Probability with which a block is left unturned in training.
        init_weights: Start with no rotation; False starts with small random ones (for tests).
        coft: Keep every rotation small.
        eps: How small, with `coft`.
        block_share: Turn all blocks alike.
        use_cayley_neumann: Cut the inverse of the Cayley transform off.
        num_cayley_neumann_terms: After so many terms.

    Raises:
        ConfigError: Not exactly one of `r` and `oft_block_size` is given, or a value is out of its range.
    """

    adapter = Oft
    peft_name = "OFT"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.oft_block_size) != 0 or max(self.r, self.oft_block_size) <= 0:
            raise ConfigError(
                f"OFTConfig: r={self.r} and oft_block_size={self.oft_block_size}; the one to go by has to be positive "
                "and the other one 0, since one follows from the other."
            )
        if self.eps <= 0 or self.num_cayley_neumann_terms < 1:
            raise ConfigError(
                f"OFTConfig: eps={self.eps!r} and num_cayley_neumann_terms={self.num_cayley_neumann_terms!r}; positive "
                "numbers were expected."
            )
        check_shares(self, "module_dropout")
