"""MiCA: `up` spans the weight's minor directions and stays as it is; `down` is trained."""

import torch

from veneer.inits.start import Start


def mica(start: Start) -> None:
    """up = the left singular vectors of the r smallest singular values of the weight; down = 0.

    Raises:
        ConfigError: r is more than the weight's rank can be.

    Source: arXiv:2604.01694.
    """
    start.check_rank("mica")
    u = torch.linalg.svd(start.weight(), full_matrices=False)[0]
    start.fill(torch.zeros_like(start.down), u[..., -start.rank :])
