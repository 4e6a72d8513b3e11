"""Gaussian `down`, as diffusion models use."""

from torch import Tensor, nn

from veneer.inits.kaiming import kaiming


def gaussian(down: Tensor, up: Tensor, kind: str) -> None:
    """down ~ N(0, 1 / r^2), up = 0; embeddings start as by default."""
    if kind == "embedding":
        kaiming(down, up, kind)
        return
    nn.init.normal_(down, std=1 / down.shape[-2])
    nn.init.zeros_(up)
