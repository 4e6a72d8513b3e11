"""How much every entry of a frozen weight matters, by one criterion a function.

A criterion is what it adds up over the data, and what it makes of the sum and the weight. Dense scores are kept in main
memory, one for each layer, or one number a row or a layer where that is all that is asked for; on the device there is
one dense gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapter import Adapter, Base
from veneer.errors import ConfigError, StateError, nearest
from veneer.sites import Site

if TYPE_CHECKING:
    from veneer.preparation import Run

Level = Literal["parameter", "neuron", "module"]
"""What has a score of its own: every entry, every row of a weight (the sum of its entries), every weight."""

BITS, GROUP = 4, 64
"""Sensitivity to quantisation: to how many bits, and how many entries of a row share a scale."""

MOVEMENT_RATE = 0.01
"""Learning rate of the plain gradient descent whose movement is scored."""


@dataclass(frozen=True)
class Criterion:
    """A score of the entries of a weight.

    Args:
        score: Makes it from the weight and from the sum over the data, none where no data is seen.
        of_gradient: What is added up: a function of the gradient of the loss.
        each_example: Whether the gradient is that of single examples.
        is_sum: Whether the score is the sum itself, so that rows and layers can be added up as it comes.
        moves: Whether the weight moves while it is scored; then the sum is of -gradient times weight.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    of_gradient: Callable[[Tensor], Tensor] | None = None
    each_example: bool = False
    is_sum: bool = False
    moves: bool = False


def _as_it_is(gradient: Tensor) -> Tensor:
    return gradient


def _the_sum(weight: Tensor, total: Tensor) -> Tensor:
    return total


def rounding(weight: Tensor) -> Tensor:
    """What each entry loses when it is rounded to `BITS` bits, with the largest of every `GROUP` of a row as scale."""
    columns = weight.shape[-1]
    padded = F.pad(weight, (0, -columns % GROUP))
    groups = padded.unflatten(-1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / (2 ** (BITS - 1) - 1)
    rounded = (groups / step.clamp_min(torch.finfo(weight.dtype).tiny)).round() * step
    return (rounded.flatten(-2) - padded)[..., :columns]


CRITERIA = {
    "random": Criterion(lambda weight, total: torch.rand(weight.shape)),
    # Large weights matter (Han et al. 2015, arXiv:1506.02626).
    "magnitude": Criterion(lambda weight, total: weight.abs()),
    # What the loss would move most.
    "gradient": Criterion(lambda weight, total: total.abs(), _as_it_is),
    # How much the loss changes, to first order, if the entry is removed (Lee et al. 2019, arXiv:1810.02340, eq. 4).
    "snip": Criterion(lambda weight, total: (weight * total).abs(), _as_it_is),
    # The diagonal of the empirical Fisher information (Sung et al. 2021, arXiv:2111.09839, eq. 4).
    "fisher": Criterion(_the_sum, torch.square, each_example=True, is_sum=True),
    # How far training drives the entry away from zero (Sanh et al. 2020, arXiv:2005.07683, eq. 3).
    "movement": Criterion(_the_sum, _as_it_is, is_sum=True, moves=True),
    # How much the loss rises, to second order, if the entry is rounded (Kim et al. 2023, arXiv:2306.07629, eq. 4).
    "quantization": Criterion(lambda weight, total: total * rounding(weight).square() / 2, torch.square, True),
}


def criterion_of(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in CRITERIA:
        raise ConfigError(f"Unknown criterion {name!r}.{nearest(name, CRITERIA)} Known: {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def needs_data(criterion: str) -> bool:
    return CRITERIA[criterion].of_gradient is not None


def without_data(site: Site, criterion: str) -> Tensor:
    """The score of every entry, where it does not depend on data; in the shape of the weight."""
    weight = site.read()
    return finite(CRITERIA[criterion].score(weight, weight), criterion, "a weight")


def from_data(
    sites: Mapping[str, Site],
    criterion: str,
    run: Run,
    level: Level = "parameter",
    seen: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """The scores of all places, from the gradients of the batches; in main memory.

    Args:
        sites: The frozen layers by path.
        criterion: Key of `CRITERIA`.
        run: Passes the batches through the model.
        level: What has a score of its own.
        seen: Called after every batch.

    Raises:
        StateError: There is no batch, no loss, or a score is not a number.
    """
    rule = CRITERIA[criterion]
    totals: dict[str, Tensor] = {}
    early: Level = level if rule.is_sum else "parameter"

    def add(path: str, part: Tensor) -> None:
        part = reduced(part.float(), early).cpu()
        totals[path] = totals[path].add_(part) if path in totals else part.clone()

    def until() -> bool:
        seen()
        return False

    if rule.moves:
        _move(sites, run, add, seen)
    else:
        of_gradient = rule.of_gradient
        assert of_gradient is not None
        run.gradients(lambda path, g: add(path, of_gradient(g)), each_example=rule.each_example, until=until)
    scores: dict[str, Tensor] = {}
    for path, site in sites.items():
        if path not in totals:  # what takes no part in the loss matters nothing
            scores[path] = reduced(torch.zeros((*site.batch, *site.shape)), level)
            continue
        total = totals.pop(path)
        score = total if rule.is_sum else reduced(rule.score(site.read().float().cpu(), total), level)
        scores[path] = finite(score, criterion, path)
    return scores


def reduced(score: Tensor, level: Level) -> Tensor:
    """The score of every entry, the sum of every row, or the sum of all."""
    if level == "parameter":
        return score
    return score.sum(-1) if level == "neuron" else score.sum()


def finite(score: Tensor, criterion: str, where: str) -> Tensor:
    """The score, if it is a number everywhere: nothing could be ranked by it otherwise.

    Raises:
        StateError: It is not.
    """
    if not bool(torch.isfinite(score).all()):
        raise StateError(
            f"The {criterion} score of {where} is not a number everywhere: the weights, the loss or its gradient are "
            "not finite. Look for examples that give an infinite loss, or use a wider dtype than float16."
        )
    return score


def _move(sites: Mapping[str, Site], run: Run, add: Callable[[str, Tensor], None], seen: Callable[[], None]) -> None:
    """One pass of plain gradient descent of all weights over the batches; adds -gradient * weight in every step."""
    probes = {path: _Moving(site, path, add) for path, site in sites.items()}
    batches = run.batches = list(run.batches)
    if not batches:
        raise StateError("There was no batch to score by. Pass at least one.")
    run.train(probes, seen, len(batches))


class _Moving(Adapter):
    """A copy of the weight that takes a step of gradient descent as soon as its gradient is there."""

    def __init__(self, site: Site, path: str, see: Callable[[str, Tensor], None]) -> None:
        super().__init__(site, None)
        self.path = path
        self.see = see
        self.moved: Tensor | None = None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        assert self.site is not None
        if self.moved is None:
            self.moved = base.weight().detach().clone().requires_grad_(True)
            self.moved.register_post_accumulate_grad_hook(self._step)
        return self.site.apply(x, self.moved, base.bias(), base.args, base.kwargs)

    def _step(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        with torch.no_grad():
            self.see(self.path, -gradient * weight)
            weight.sub_(gradient, alpha=MOVEMENT_RATE)
