"""What an initialiser is given, and the decompositions that several of them make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError

SEED = 42
"""Of random projections: the same start in every process and whenever an adapter is made again."""


@dataclass(frozen=True)
class Start:
    """The factors to fill, and the place that they are for.

    Args:
        down: `(r, in)`, or `(n, r, in)` for a stack.
        up: `(out, r)`, or `(n, out, r)`.
        kind: Kind of the site.
        scaling: What the product up down is multiplied by.
        read: Gives the frozen weight, which may not be changed.
        settings: The initialiser's own settings.
        seen: What was seen of data at this place, for initialisers that need it.
    """

    down: Tensor
    up: Tensor
    kind: str = "linear"
    scaling: float = 1.0
    read: Callable[[], Tensor] | None = None
    settings: Any = None
    seen: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.down.shape[-2]

    def weight(self) -> Tensor:
        """The frozen weight, in float32 or more."""
        assert self.read is not None
        return wide(self.read().detach())

    @torch.no_grad()
    def fill(self, down: Tensor, up: Tensor) -> None:
        """Writes both factors."""
        self.down.copy_(down)
        self.up.copy_(up)

    def check_rank(self, name: str, most: int | None = None) -> None:
        """Refuses a rank above that of the weight.

        Raises:
            ConfigError: So.
        """
        shape = (self.up.shape[-2], self.down.shape[-1])
        most = min(shape) if most is None else most
        if self.rank > most:
            raise ConfigError(
                f"init_lora_weights={name!r}: r={self.rank}, but the layer is {shape}; at most {most} was expected. "
                "Lower r, give the layer another one in rank_pattern, or leave it out of the targets."
            )


def wide(tensor: Tensor) -> Tensor:
    """In float32 or more, in which decompositions are made."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def balanced(u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """down and up with scaling * up down = u diag(s) vh, and the singular values halved between them."""
    root = (s / scaling).sqrt()
    return root.unsqueeze(-1) * vh, u * root.unsqueeze(-2)


def low_rank(matrix: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """About the leading `rank` singular triplets u, s, vh, by subspace iteration from a random projection."""
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        u, s, v = torch.svd_lowrank(matrix, q=rank, niter=iterations)
    return u, s, v.mT
