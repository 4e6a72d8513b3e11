"""OLoRA: the factors start as part of the weight's QR decomposition, and the rest of the weight stays frozen."""

import torch

from veneer.inits.start import Start


def olora(start: Start) -> None:
    """up = the first r columns of Q, which are orthonormal; down = the first r rows of R; W = Q R.

    Raises:
        ConfigError: r is more than the weight's rank can be.

    Source: Büyükakyüz 2024, arXiv:2406.01775, algorithm 1.
    """
    start.check_rank("olora")
    q, r = torch.linalg.qr(start.weight())
    start.fill(r[..., : start.rank, :], q[..., : start.rank])
