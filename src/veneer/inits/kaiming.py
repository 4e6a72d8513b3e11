"""Kaiming-uniform `down`, as torch starts a linear layer."""

import math

from torch import Tensor, nn

from veneer.inits.start import Start


def kaiming(start: Start) -> None:
    """down ~ U(-1/sqrt(in), 1/sqrt(in)), up = 0; on embeddings down = 0 and up ~ N(0, 1).

    Source: Hu et al. 2021, arXiv:2106.09685, and the authors' loralib, whose layers differ in this between kinds.
    """
    if start.kind == "embedding":
        nn.init.zeros_(start.down)
        nn.init.normal_(start.up)
        return
    _uniform(start.down)
    nn.init.zeros_(start.up)


def kaiming_nonzero(start: Start) -> None:
    """Both factors random, so that the adapter changes the model at once. For tests."""
    if start.kind == "embedding":
        nn.init.normal_(start.down)
        nn.init.normal_(start.up)
        return
    _uniform(start.down)
    _uniform(start.up)


def _uniform(factor: Tensor) -> None:
    for matrix in factor if factor.dim() == 3 else [factor]:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
