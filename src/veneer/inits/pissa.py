"""PiSSA: the factors start as the principal part of the weight, and the rest of the weight stays frozen."""

import torch

from veneer.inits.start import Start, balanced, low_rank


def pissa(start: Start) -> None:
    """up = U_r sqrt(S_r / s), down = sqrt(S_r / s) V_r^T, of the r largest singular values of the weight U S V^T.

    s is the adapter's scaling, so that s up down is the weight's best approximation of rank r.

    Raises:
        ConfigError: r is more than the weight's rank can be.

    Source: Meng et al. 2024, arXiv:2404.02948, eqs. 2 to 4.
    """
    start.check_rank("pissa")
    u, s, vh = torch.linalg.svd(start.weight(), full_matrices=False)
    rank = start.rank
    start.fill(*balanced(u[..., :rank], s[..., :rank], vh[..., :rank, :], start.scaling))


def fast_pissa(start: Start, iterations: int) -> None:
    """As `pissa`, with singular vectors found by subspace iteration, which is much faster and nearly as good."""
    start.check_rank("pissa_niter")
    start.fill(*balanced(*low_rank(start.weight(), start.rank, iterations), start.scaling))
