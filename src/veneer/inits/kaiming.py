"""Kaiming-uniform `down`, as torch starts a linear layer."""

import math

from torch import Tensor, nn


def kaiming(down: Tensor, up: Tensor, kind: str) -> None:
    """down ~ U(-1/sqrt(in), 1/sqrt(in)), up = 0; on embeddings down = 0 and up ~ N(0, 1).

    Source: Hu et al. 2021, arXiv:2106.09685, and the authors' loralib, whose layers differ in this between kinds.
    """
    if kind == "embedding":
        nn.init.zeros_(down)
        nn.init.normal_(up)
        return
    _uniform(down)
    nn.init.zeros_(up)


def kaiming_nonzero(down: Tensor, up: Tensor, kind: str) -> None:
    """Both factors random, so that the adapter changes the model at once. For tests."""
    if kind == "embedding":
        nn.init.normal_(down)
        nn.init.normal_(up)
        return
    _uniform(down)
    _uniform(up)


def _uniform(factor: Tensor) -> None:
    for matrix in factor if factor.dim() == 3 else [factor]:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
