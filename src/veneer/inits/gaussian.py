"""Gaussian `down`, as diffusion models use."""

from torch import nn

from veneer.inits.kaiming import kaiming
from veneer.inits.start import Start


def gaussian(start: Start) -> None:
    """down ~ N(0, 1 / r^2), up = 0; embeddings start as by default."""
    if start.kind == "embedding":
        kaiming(start)
        return
    nn.init.normal_(start.down, std=1 / start.rank)
    nn.init.zeros_(start.up)
