"""Orthogonal factors whose product is zero at the start."""

import torch

from veneer.errors import ConfigError
from veneer.inits.start import Start


def orthogonal(start: Start) -> None:
    """up and down have orthogonal rows through disjoint halves of one random orthogonal (r, r) matrix Q.

        up = A Q[0::2] / 10,   down = Q[1::2]^T B / 10,   A (out, r/2), B (r/2, in) normal;  up down = 0

    Both factors are then non-zero and get gradients from the first step.

    Raises:
        ConfigError: r is odd, or the place is not a single matrix.
    """
    rank = start.rank
    if rank % 2 or start.down.dim() != 2:
        raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank and a single matrix; r is {rank}.")
    q = torch.linalg.qr(torch.randn(rank, rank))[0]
    up = torch.randn(start.up.shape[0], rank // 2) @ q[0::2] / 10
    start.fill(q[1::2].t() @ torch.randn(rank // 2, start.down.shape[1]) / 10, up)
