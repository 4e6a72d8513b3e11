"""LoftQ: the factors start as what quantising the weight loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.config import Nested
from veneer.errors import ConfigError
from veneer.inits.start import Start, balanced

BLOCK = 64

# NF4: sixteen quantiles of the normal distribution, one more above zero than below, scaled to [-1, 1].
# Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NORMAL_FLOAT = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class LoftQConfig(Nested):
    """Settings of LoftQ.

    Args:
        loftq_bits: 4 for NF4 in blocks of 64, 8 for whole numbers with one scale a row.
        loftq_iter: How often weight and factors are fitted to each other.

    Raises:
        ConfigError: There is no iteration.
    """

    loftq_bits: Literal[4, 8] = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loftq_iter < 1:
            raise ConfigError(f"LoftQConfig: loftq_iter={self.loftq_iter}; at least 1 was expected.")


def loftq(start: Start) -> tuple[Tensor, Tensor]:
    """Fits Q + s up down to the weight W, with Q a quantised weight.

        Q_t = q(W - s up_(t-1) down_(t-1)),   s up_t down_t = best rank r of W - Q_t,   up_0 down_0 = 0

    Args:
        start: The factors to fill with up_T, down_T.

    Returns:
        down_(T-1) and up_(T-1), of which Q_T follows.

    Raises:
        ConfigError: r is more than the weight's rank can be.

    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """
    start.check_rank("loftq")
    weight, rank = start.weight(), start.rank
    before = down, up = torch.zeros_like(start.down), torch.zeros_like(start.up)
    for _ in range(start.settings.loftq_iter):
        before = down, up
        # The factors are rounded to their own type before they are used, as they will be when the weight is adapted.
        product = start.scaling * (up.to(weight.dtype) @ down.to(weight.dtype))
        lost = weight - quantised(weight - product, start.settings.loftq_bits)
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        pair = balanced(u[..., :rank], s[..., :rank], vh[..., :rank, :], start.scaling)
        down, up = (factor.to(start.down.dtype) for factor in pair)
    start.fill(down, up)
    return before


def quantised(weight: Tensor, bits: int) -> Tensor:
    """The weight as it is after quantising and back, in its own type."""
    if bits == 8:
        scale = weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        return (weight / scale).round_() * scale
    codes = torch.tensor(NORMAL_FLOAT, device=weight.device, dtype=weight.dtype)
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    nearest = torch.bucketize(blocks / scale, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).flatten()[: flat.numel()].view(weight.shape)
