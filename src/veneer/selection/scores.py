"""How much every entry of a frozen weight matters, by one criterion a function.

A criterion is what it adds up over the data, and what it makes of the sum and the weight. Dense scores are kept in main
memory, one for each layer; on the device there is one dense gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.sites import Site

if TYPE_CHECKING:
    from veneer.preparation import Run


@dataclass(frozen=True)
class Criterion:
    """A score of the entries of a weight.

    Args:
        score: Makes it from the weight and from the sum over the data, none where no data is seen.
        of_gradient: What is added up: a function of the gradient of the loss.
        each_example: Whether the gradient is that of single examples.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    of_gradient: Callable[[Tensor], Tensor] | None = None
    each_example: bool = False


def _as_it_is(gradient: Tensor) -> Tensor:
    return gradient


CRITERIA = {
    "random": Criterion(lambda weight, total: torch.rand(weight.shape)),
    # Large weights matter (Han et al. 2015, arXiv:1506.02626).
    "magnitude": Criterion(lambda weight, total: weight.abs()),
    # What the loss would move most.
    "gradient": Criterion(lambda weight, total: total.abs(), _as_it_is),
    # How much the loss changes, to first order, if the entry is removed (Lee et al. 2019, arXiv:1810.02340, eq. 4).
    "snip": Criterion(lambda weight, total: (weight * total).abs(), _as_it_is),
    # The diagonal of the empirical Fisher information (Sung et al. 2021, arXiv:2111.09839, eq. 4).
    "fisher": Criterion(lambda weight, total: total, torch.square, each_example=True),
}


def needs_data(criterion: str) -> bool:
    return CRITERIA[criterion].of_gradient is not None


def without_data(site: Site, criterion: str) -> Tensor:
    """The score of every entry, where it does not depend on data; in the shape of the weight."""
    weight = site.read()
    return CRITERIA[criterion].score(weight, weight)


def from_data(sites: Mapping[str, Site], criterion: str, run: Run) -> dict[str, Tensor]:
    """The scores of all places, from the gradients of the batches; in main memory.

    Args:
        sites: The frozen layers by path.
        criterion: Key of `CRITERIA`.
        run: Passes the batches through the model.

    Raises:
        StateError: There is no batch, or no loss.
    """
    rule = CRITERIA[criterion]
    of_gradient = rule.of_gradient
    assert of_gradient is not None
    totals: dict[str, Tensor] = {}

    def add(path: str, gradient: Tensor) -> None:
        part = of_gradient(gradient).float().cpu()
        totals[path] = totals[path].add_(part) if path in totals else part.clone()

    run.gradients(add, each_example=rule.each_example)
    scores: dict[str, Tensor] = {}
    for path, site in sites.items():  # what takes no part in the loss matters nothing
        weight = site.read().float().cpu()
        scores[path] = rule.score(weight, totals.pop(path) if path in totals else torch.zeros_like(weight))
    return scores
